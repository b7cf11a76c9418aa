"""Rows come in many kinds of files, and are the same rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lorasuite.data import Message, calibration_texts, read_prompts, read_rows
from lorasuite.errors import DataError

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
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
        case "parquet.gz":
            plain = saved("parquet", folder)
            path.write_bytes(gzip.compress(plain.read_bytes()))
        case "folder":
            datasets.Dataset.from_list(RECORDS).save_to_disk(str(path))
    return path


@pytest.mark.parametrize(
    "kind", ["jsonl", "jsonl.gz", "json.gz", "data", "csv", "tsv", "csv.gz", "parquet", "parquet.gz", "folder"]
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
        ("a.csv", b"prompt,completion\na,b,c\n", "row 1: has another number of cells than the header"),
        ("a.csv", b"question,answer\na,b\n", "row 1: has no known shape .its keys: 'question', 'answer'"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


def test_folders_that_hold_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path)
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
