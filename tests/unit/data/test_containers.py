"""Rows come in many kinds of files, and are the same rows."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lorasuite.data import Message, calibration_texts, parse_columns, read_prompts, read_rows, rows_to_jsonl
from lorasuite.errors import ConfigError, DataError

RECORDS = [{"prompt": "What is 1, 2?", "completion": "3"}, {"prompt": "two\nlines", "completion": '"quoted"'}]
CSV = 'prompt,completion\n"What is 1, 2?",3\n"two\nlines","""quoted"""\n'


def saved(kind: str, folder: Path) -> Path:
    """The records as a file or folder of a kind."""
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    path = folder / f"rows.{kind}"
    match kind:
        case "jsonl":
            path.write_text(lines)
        case "jsonl.gz" | "data":
            path.write_bytes(gzip.compress(lines.encode()))
        case "json.gz":
            path.write_bytes(gzip.compress(json.dumps(RECORDS).encode()))
        case "csv":
            path.write_text("\ufeff" + CSV)
        case "tsv":
            path.write_text("prompt\tcompletion\nWhat is 1, 2?\t3\n" + '"two\nlines"\t"""quoted"""\n')
        case "csv.gz":
            path.write_bytes(gzip.compress(CSV.encode()))
        case "jsonl.bz2":
            path.write_bytes(bz2.compress(lines.encode()))
        case "jsonl.xz":
            path.write_bytes(lzma.compress(lines.encode()))
        case "jsonl.zst":
            with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
                stream.write(lines.encode())
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
        case "parquet.gz":
            plain = saved("parquet", folder)
            path.write_bytes(gzip.compress(plain.read_bytes()))
        case "folder":
            datasets.Dataset.from_list(RECORDS).save_to_disk(str(path))
    return path


@pytest.mark.parametrize(
    "kind",
    [
        *("jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "jsonl.zst", "json.gz", "data"),
        *("csv", "tsv", "csv.gz", "parquet", "parquet.gz", "folder"),
    ],
)
def test_every_container_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    rows = read_rows(saved(kind, tmp_path))
    assert [(row.prompt, row.completion, row.extra) for row in rows] == [(*record.values(), {}) for record in RECORDS]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"PAR1....", "is a Parquet file. Name it .parquet"),
        ("a.parquet", b"PAR1....", "a.parquet: cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-3], "a.jsonl.gz: cannot be read"),
        ("a.xlsx", b"PK\x03\x04...", "is a zip archive or a spreadsheet. Unpack it"),
        ("a.pkl", b"\x80\x04\x95...", "is a pickle"),
        ("a.arrow", b"ARROW1..", "is an Arrow file. Give the folder"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd....", "a.jsonl.zst: cannot be read"),
        ("a.jsonl.xz", b"\xfd7zXZ\x00....", "a.jsonl.xz: cannot be read"),
        ("a.csv", b"prompt,completion\na,b,c\n", "row 1: has another number of cells than the header"),
        ("a.csv", b"question,answer\na,b\n", "row 1: has no known shape .its keys: 'question', 'answer'"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


def test_folders_that_hold_no_rows(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is a folder, and no data set that save_to_disk wrote"):
        read_rows(tmp_path / "empty")
    splits = {"train": datasets.Dataset.from_list(RECORDS)}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"holds several splits. Give one of them: .*d/train"):
        read_rows(tmp_path / "d")
    assert len(read_rows(tmp_path / "d" / "train")) == 2
    with pytest.raises(DataError, match="does not exist"):
        read_rows(tmp_path / "none.parquet")


def test_sharegpt(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"conversations": turns, "system": "Be brief.", "id": 1}))
    (row,) = read_rows(path)
    assert row.messages == (Message("system", "Be brief."), Message("user", "q"), Message("assistant", "a"))
    assert row.extra == {"id": 1} and calibration_texts(path) == ["Be brief.\nq\na"]
    assert read_prompts(path)[0].messages == row.messages[:2]
    path.write_text(json.dumps({"conversations": turns[:1]}))
    assert read_prompts(path)[0].messages == (Message("user", "q"),)
    path.write_text(json.dumps({"conversations": [{"from": "observer", "value": "q"}]}))
    with pytest.raises(DataError, match=r"has no known shape .its keys: 'conversations'"):
        read_rows(path)
    path.write_text(json.dumps({"messages": turns}))
    assert read_rows(path)[0].messages == (Message("user", "q"), Message("assistant", "a")), "under the other name"


def test_a_table_has_no_keys_without_a_value(tmp_path: Path) -> None:
    """A Parquet file has each object's keys in all of them, and values that JSON has not."""
    call = {"name": "f"}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    record = {"messages": turns, "made": datetime.datetime(2026, 1, 2), "picture": b"..."}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
    (row,) = read_rows(tmp_path / "a.parquet")
    assert row.messages[0] == Message("user", "q", {})
    assert row.messages[1].fields == {"tool_calls": [call], "content": None}
    assert row.extra == {"made": "2026-01-02 00:00:00", "picture": "<bytes>"}
    rows_to_jsonl([row])  # what a stage stores


def test_a_long_cell(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "word " * 50_000)
    assert len(read_rows(tmp_path / "a.csv")[0].text) > 131_072


def columns(*pairs: str) -> dict[str, str]:
    return parse_columns(pairs)


def test_columns_of_other_names(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    record = {"text": "q", "label": 1, "prompt": "not this one", "messages": [], "id": 7}
    path.write_text(json.dumps(record))
    (row,) = read_rows(path, columns("prompt=text", "completion=label"))
    assert (row.kind, row.prompt, row.completion, row.extra) == ("completion", "q", "1", {"id": 7})
    (row,) = read_rows(path, columns("prompt=prompt", "completion=text"))
    assert (row.prompt, row.completion) == ("not this one", "q")
    (row,) = read_rows(path, columns("completion=prompt", "prompt=text"))
    assert (row.prompt, row.completion) == ("q", "not this one")
    assert read_prompts(path, columns("prompt=text", "completion=answer"))[0].prompt == "q"
    path.write_text(json.dumps({"question": "q", "input": "c", "answer": "a", "system": ""}))
    (row,) = read_rows(path, columns("instruction=question", "output=answer"))
    assert (row.instruction, row.input, row.output, row.extra) == ("q", "c", "a", {"system": ""})
    chat = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path.write_text(json.dumps({"dialog": chat, "functions": [{"name": "f"}]}))
    (row,) = read_rows(path, columns("messages=dialog", "tools=functions"))
    assert row.messages[1] == Message("assistant", "a") and row.extra == {"tools": [{"name": "f"}]}


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    named = columns("prompt=text", "completion=label")
    path.write_text('{"prompt": "q", "completion": "a"}')  # named as rows are: nothing to rename
    assert read_rows(path, named)[0].prompt == "q"
    path.write_text('{"text": "q"}\n{"text": "r"}\n')
    with pytest.raises(DataError, match=r"line 1: has no column 'label' .its columns: 'text'. .and 1 more"):
        read_rows(path, named)
    assert calibration_texts(path, columns=named) == ["q", "r"], "texts may have another shape"
    with pytest.raises(ConfigError) as error:
        columns("prompt", "promt=text", "text=a", "text=b")
    assert [problem.what for problem in error.value.problems] == [
        "'prompt' is not field=column",
        "no row has a field 'promt'",
        "'text' is named twice",
    ]


def _packed(path: Path) -> None:
    {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[path.suffix](path, "wt").write('{"text": "a"}\n' * 10_000)


#: Small files that stand for many bytes, rows or columns.
BOMBS: dict[str, tuple[Callable[[Path], object], str]] = {
    **{f"a.jsonl.{kind}": (_packed, "more than 100,000 bytes") for kind in ("gz", "bz2", "xz")},
    "a.jsonl.zst": (
        lambda path: path.write_bytes(pyarrow.compress(b'{"text": "a"}\n' * 10_000, "zstd", asbytes=True)),
        "more than 100,000 bytes",
    ),
    "plain.jsonl": (lambda path: path.write_bytes(b" " * 100_001), "more than 100,000 bytes"),
    "rows.jsonl": (lambda path: path.write_text('{"text": "a"}\n' * 501), "more than 500 rows"),
    "rows.json": (lambda path: path.write_text("[" + '{"text": "a"},' * 500 + '{"text": "a"}]'), "more than 500 rows"),
    "rows.txt": (lambda path: path.write_text("a\n\n" * 501), "more than 500 rows"),
    "rows.csv": (lambda path: path.write_text("text\n" + "a\n" * 501), "more than 500 rows"),
    "columns.csv": (lambda path: path.write_text(",".join(map(str, range(10_001)))), "more than 10,000 columns"),
    "rows.parquet": (
        lambda path: pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.nulls(501)}), path),
        "more than 500 rows",
    ),
    # one text for all rows
    "bytes.parquet": (
        lambda path: pyarrow.parquet.write_table(
            pyarrow.table({"text": pyarrow.array(["x" * 1000] * 300).dictionary_encode()}), path
        ),
        "more than 100,000 bytes",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_that_stand_for_much(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, said = BOMBS[name]
    write(tmp_path / name)
    monkeypatch.setenv("LORASUITE_READ_BYTES", "100000")
    monkeypatch.setenv("LORASUITE_READ_ROWS", "500")
    with pytest.raises(DataError, match=f"{name}: has {said}"):
        read_rows(tmp_path / name)
    if "columns" not in name and "plain" not in name and "rows.parquet" not in name:
        monkeypatch.setenv("LORASUITE_READ_BYTES", "1000000")
        monkeypatch.setenv("LORASUITE_READ_ROWS", "10000")
        assert len(read_rows(tmp_path / name)) in (300, 501, 10_000)
        monkeypatch.setenv("LORASUITE_READ_ROWS", "many")
        with pytest.raises(ConfigError, match="LORASUITE_READ_ROWS: is 'many'"):
            read_rows(tmp_path / name)


def test_a_source_of_wrong_rows_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n" * 20_000)
    with pytest.raises(DataError, match="was read no further") as refused:
        read_rows(tmp_path / "rows.jsonl")
    assert len(refused.value.problems) == 10_001


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"text": "a"}, ]', "Expecting value"),
        ('[{"text": "a"} {"text": "b"}]', "Expecting ',' delimiter"),
        ('[{"text": "a"}] 1', "Extra data"),
        ('[{"text": "a"}', "Expecting ',' delimiter"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"a": ' + "1" * 5_000 + "}", "is not valid JSON"),
    ],
)
def test_arrays_and_values_that_are_no_json(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=said):
        read_rows(tmp_path / "rows.json")
