"""Files and folders of records: JSON, JSON Lines, CSV, Parquet, gzip of these, and data sets saved to disk."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorasuite.errors import DataError, Problem

_REMEDY = "Give a file of JSON, JSON Lines, CSV, Parquet or text, or a folder that datasets' save_to_disk wrote"


def read_text(path: Path) -> str:
    """The file's text, unpacked where it is gzip, without its byte-order mark.

    Raises:
        DataError: the file is missing, empty or not UTF-8, or what it holds goes by another name than its own.
    """
    raw = _bytes(path)
    if raw[:4] == b"PAR1":
        raise DataError([Problem(str(path), "is a Parquet file", "Name it .parquet")])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            [Problem(f"{path}, line {line}", f"is not UTF-8 (byte {error.start})", "Save the file as UTF-8")]
        ) from error
    if not text.strip():
        raise DataError([Problem(str(path), "is empty", _REMEDY)])
    return text


def suffix(path: Path) -> str:
    """What the file is called, without the ``.gz`` of a packed one, in small letters."""
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return plain.suffix.lower()


def records(path: Path, problems: list[Problem]) -> Iterator[tuple[str, Any]]:
    """``(where, value)`` of each record; what cannot be parsed goes to ``problems``.

    Raises:
        DataError: as :func:`read_text`, or if a table or saved data set cannot be read.
    """
    if path.is_dir() or suffix(path) == ".parquet":
        for number, value in enumerate(_table(path), start=1):
            yield f"{path}, row {number}", value
        return
    text = read_text(path)
    if suffix(path) in (".csv", ".tsv"):
        # By the standard library: datasets and pandas make numbers of answers that look like one.
        delimiter = "\t" if suffix(path) == ".tsv" else ","
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter), start=1):
            if None in row or None in row.values():
                what = "has another number of cells than the header"
                problems.append(Problem(f"{path}, row {number}", what, "Put cells that hold commas in quotes"))
            else:
                yield f"{path}, row {number}", row
        return
    yield from _json_records(path, text, problems)


def _bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError) as error:  # gzip's own errors are among them
        reason = getattr(error, "strerror", None) or error
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({reason})"
        raise DataError([Problem(str(path), what, _REMEDY)]) from error


def _table(path: Path) -> Iterator[Any]:
    """The rows of a Parquet file or of a data set saved to disk."""
    import datasets
    import pyarrow.parquet

    try:
        if path.is_dir():
            found = datasets.load_from_disk(str(path))
            if isinstance(found, datasets.DatasetDict):
                splits = ", ".join(str(path / name) for name in found)
                raise DataError([Problem(str(path), "holds several splits", f"Give one of them: {splits}")])
            return iter(found)
        source = io.BytesIO(_bytes(path)) if path.suffix.lower() == ".gz" else path
        return iter(pyarrow.parquet.read_table(source).to_pylist())
    except (OSError, ValueError) as error:  # pyarrow's errors are among them
        if isinstance(error, DataError):
            raise
        what = "does not exist" if not path.exists() else f"cannot be read ({error})"
        raise DataError([Problem(str(path), what, _REMEDY)]) from error


def _json_records(path: Path, text: str, problems: list[Problem]) -> Iterator[tuple[str, Any]]:
    """``(where, value)`` of each record; what cannot be parsed goes to ``problems``."""
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            what = f"is not valid JSON ({error.msg}, column {error.colno})"
            problems.append(Problem(f"{path}, line {error.lineno}", what, "Correct it, or use JSONL"))
            return
        for number, value in enumerate(values, start=1):
            yield f"{path}, row {number}", value
        return
    if suffix(path) == ".json":
        # One object spread over several lines is a legal .json file, but not JSONL.
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            pass
        else:
            yield f"{path}, row 1", value
            return
    # Not splitlines(): JSON strings may hold U+2028 and others that it would split at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            what = f"is not valid JSON ({error.msg}, column {error.colno})"
            problems.append(Problem(where, what, "Write one JSON object a line"))
            continue
        yield where, value
