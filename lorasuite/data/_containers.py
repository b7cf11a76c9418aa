"""Files, folders and data sets of records: JSON, JSON Lines, CSV, Parquet, these packed, saved to disk, on the Hub."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from lorasuite.data._limits import READ_BYTES, check_bytes, check_columns, counted, enough, limit
from lorasuite.data._tables import from_disk, from_hub, from_parquet
from lorasuite.errors import DataError, Problem

_REMEDY = (
    "Give a file of JSON, JSON Lines, CSV, Parquet or text, a folder that datasets' save_to_disk wrote, "
    "or hf://org/name[:split]"
)


def read_text(path: Path) -> str:
    """The file's text, unpacked where it is packed, without its byte-order mark.

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
    """What the file is called, without the ``.gz`` or the like of a packed one, in small letters."""
    plain = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return plain.suffix.lower()


def records(path: Path | str, problems: list[Problem]) -> Iterator[tuple[str, Any]]:
    """``(where, value)`` of each record; what cannot be parsed goes to ``problems``.

    Args:
        path: a file or folder, or as text a data set of the Hub.

    Raises:
        DataError: as :func:`read_text`, or if a table or data set cannot be read, or has more rows than are read.
    """
    yield from counted(path, _records(path, problems))


def _records(path: Path | str, problems: list[Problem]) -> Iterator[tuple[str, Any]]:
    if isinstance(path, str):
        for number, value in enumerate(from_hub(path), start=1):
            yield f"{path}, row {number}", value
        return
    if path.is_dir() or suffix(path) == ".parquet":
        for number, value in enumerate(_table(path), start=1):
            yield f"{path}, row {number}", value
        return
    text = read_text(path)
    if suffix(path) in (".csv", ".tsv"):
        yield from _csv_records(path, text, problems)
        return
    yield from _json_records(path, text, problems)


def _bytes(path: Path) -> bytes:
    """The file's content, unpacked.

    Raises:
        DataError: it cannot be read, or is of a format that holds no rows.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe or a device may never end
            raise DataError([Problem(str(path), "is no regular file", _REMEDY)])
        check_bytes(path, path.stat().st_size)
        raw = path.read_bytes()
        unpack = next((how for magic, how in UNPACK.items() if raw.startswith(magic)), None)
        if unpack:
            raw = unpack(io.BytesIO(raw)).read(limit(READ_BYTES) + 1)
            check_bytes(path, len(raw))
    except DataError:
        raise
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:  # gzip's and pyarrow's are among them
        reason = getattr(error, "strerror", None) or error
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({reason})"
        raise DataError([Problem(str(path), what, _REMEDY)]) from error
    for magic, (name, remedy) in FOREIGN.items():
        if raw.startswith(magic):
            raise DataError([Problem(str(path), f"is {name}", remedy)])
    return raw


def _zstandard(raw: BinaryIO) -> BinaryIO:
    import pyarrow

    return cast(BinaryIO, pyarrow.CompressedInputStream(raw, "zstd"))


#: How packed files begin, and what unpacks them.
UNPACK: dict[bytes, Callable[[BinaryIO], BinaryIO]] = {
    b"\x1f\x8b": lambda raw: cast(BinaryIO, gzip.GzipFile(fileobj=raw)),
    b"BZh91AY&SY": lambda raw: cast(BinaryIO, bz2.BZ2File(raw)),
    b"\xfd7zXZ\x00": lambda raw: cast(BinaryIO, lzma.LZMAFile(raw)),  # noqa: SIM115 - of memory
    b"\x28\xb5\x2f\xfd": _zstandard,
}
#: What packed files are called.
PACKED = (".gz", ".bz2", ".xz", ".zst")
_AS_LINES = "Write its rows as JSON Lines or Parquet"
#: How files of other formats begin: what they are, and what to do.
FOREIGN = {
    b"PK\x03\x04": ("a zip archive or a spreadsheet", f"Unpack it, or: {_AS_LINES[0].lower()}{_AS_LINES[1:]}"),
    b"ARROW1": ("an Arrow file", f"Give the folder that save_to_disk wrote. Otherwise: {_AS_LINES}"),
    b"\xff\xff\xff\xff": ("an Arrow stream", f"Give the folder that save_to_disk wrote. Otherwise: {_AS_LINES}"),
    b"\x80\x04\x95": ("a pickle, which runs code when it is read", _AS_LINES),
    b"\x80\x05\x95": ("a pickle, which runs code when it is read", _AS_LINES),
    b"SQLite format 3\x00": ("an SQLite database", _AS_LINES),
    b"\x89HDF": ("an HDF5 file", _AS_LINES),
    b"\x93NUMPY": ("a NumPy array", _AS_LINES),
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "Fetch the file with `git lfs pull`"),
    b"Obj\x01": ("an Avro file", _AS_LINES),
}


def _table(path: Path) -> Iterator[Any]:
    """The rows of a Parquet file or of a data set saved to disk."""
    try:
        yield from from_disk(path) if path.is_dir() else from_parquet(path, io.BytesIO(_bytes(path)))
    except DataError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are among them
        raise DataError([Problem(str(path), f"cannot be read ({error})", _REMEDY)]) from error


def _csv_records(path: Path, text: str, problems: list[Problem]) -> Iterator[tuple[str, Any]]:
    """By the standard library: datasets and pandas make numbers of answers that look like one."""
    delimiter = "\t" if suffix(path) == ".tsv" else ","
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # 128 KiB, which a document exceeds
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        check_columns(path, len(reader.fieldnames or ()))
        for number, row in enumerate(reader, start=1):
            if enough(problems, path):
                return
            if None in row or None in row.values():
                what = "has another number of cells than the header"
                problems.append(Problem(f"{path}, row {number}", what, "Put cells that hold commas in quotes"))
            else:
                yield f"{path}, row {number}", row
    except csv.Error as error:
        problems.append(Problem(str(path), f"is not valid CSV ({error})", "Save it again as CSV"))


def _json_records(path: Path, text: str, problems: list[Problem]) -> Iterator[tuple[str, Any]]:
    """``(where, value)`` of each record; what cannot be parsed goes to ``problems``."""
    if text.lstrip().startswith("["):
        try:
            for number, value in enumerate(_elements(text), start=1):
                yield f"{path}, row {number}", value
        except json.JSONDecodeError as error:
            what = f"is not valid JSON ({error.msg}, column {error.colno})"
            problems.append(Problem(f"{path}, line {error.lineno}", what, "Correct it, or use JSONL"))
        except (ValueError, RecursionError) as error:  # integers of thousands of digits, and nesting as deep
            problems.append(Problem(str(path), f"is not valid JSON ({error})", "Correct it, or use JSONL"))
        return
    if suffix(path) == ".json":
        # One object spread over several lines is a legal .json file, but not JSONL.
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            pass
        else:
            yield f"{path}, row 1", value
            return
    for number, line in enumerate(_lines(text), start=1):
        if enough(problems, path):
            return
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            what = f"is not valid JSON ({error.msg}, column {error.colno})"
            problems.append(Problem(where, what, "Write one JSON object a line"))
            continue
        except (ValueError, RecursionError) as error:  # as above
            problems.append(Problem(where, f"is not valid JSON ({error})", "Write one JSON object a line"))
            continue
        yield where, value


def _lines(text: str) -> Iterator[str]:
    """The lines, one at a time.

    Not by ``splitlines()``: JSON strings may hold U+2028 and others that it splits at.
    """
    begin = 0
    while (end := text.find("\n", begin)) >= 0:
        yield text[begin:end]
        begin = end + 1
    yield text[begin:]


_SPACE = re.compile(r"[ \t\n\r]*")


def _elements(text: str) -> Iterator[Any]:
    """The elements of a JSON array, one at a time.

    Raises:
        ValueError: what comes next is not valid JSON.
    """

    def past(at: int) -> int:
        space = _SPACE.match(text, at)
        return at if space is None else space.end()

    decoder, at = json.JSONDecoder(), past(text.index("[") + 1)
    while text[at : at + 1] != "]":
        value, at = decoder.raw_decode(text, at)
        yield value
        at = past(at)
        if text[at : at + 1] == ",":
            at = past(at + 1)
            if text[at : at + 1] == "]":
                raise json.JSONDecodeError("Expecting value", text, at)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    if (end := past(at + 1)) != len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def source_digest(source: str) -> str:
    """SHA-256 (hex) over the rows of a data set of the Hub, which another revision or split changes.

    Raises:
        DataError: as :func:`records`.
    """
    digest = hashlib.sha256()
    for _, record in records(source, []):
        digest.update(json.dumps(record, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
