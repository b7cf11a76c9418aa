"""Tables of records: Parquet, data sets saved to disk, and data sets of the Hub."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasuite.data._limits import READ_BYTES, check_bytes, check_columns, check_rows, limit, weighed
from lorasuite.errors import DataError, Problem

if TYPE_CHECKING:
    from datasets import Dataset

#: What a data set of the Hub begins with: ``hf://org/name[@revision][/config][:split]``.
HUB = "hf://"
_HUB = re.compile(
    r"hf://(?:datasets/)?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/:]+))?(?:/(?P<config>[^:]+))?(?::(?P<split>.+))?"
)
_SPELLING = "Write hf://org/name[@revision][/config][:split]"


def from_hub(source: str) -> Iterator[Any]:
    """The rows of a data set of the Hub, or of datasets' cache where the Hub is not reached; ``train`` without a split.

    Raises:
        DataError: the address is not one, or the data set, its configuration or its split cannot be had.
    """
    import datasets

    found = _HUB.fullmatch(source)
    if found is None:
        raise DataError([Problem(source, "is no address of a data set", _SPELLING)])
    name, split = found["name"], found["split"] or "train"
    if Path(name).exists():  # datasets would read it in place of the Hub's
        what = f"there is a local folder {name}, which datasets takes for the data set"
        raise DataError([Problem(source, what, "Give its files by their paths, or run this somewhere else")])
    try:
        builder = datasets.load_dataset_builder(name, found["config"], revision=found["revision"])
        if found["revision"] and type(builder).__name__ == "Cache":
            what = "the Hub is not reached, and datasets' cache does not say which revision it holds"
            raise DataError([Problem(source, what, "Leave the revision out, or run it with a connection")])
        builder.download_and_prepare()
        yield from weighed(source, _values(builder.as_dataset(split=split)))
    except DataError:
        raise
    except Exception as error:  # its own errors, and those of the Hub's client, of fsspec and of each file format
        reason = str(error).partition("\n")[0] or type(error).__name__
        cause = error.__cause__
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and cause is not None:
            reason = f"{reason}: {cause}".partition("\n")[0]
        remedy = "Check name, configuration and split, and that the Hub is reached (offline, only what was loaded once)"
        raise DataError([Problem(source, f"cannot be loaded ({reason})", f"{remedy}. {_SPELLING}")]) from error


def from_disk(path: Path) -> Iterator[Any]:
    """The rows of a data set that ``save_to_disk`` wrote.

    Raises:
        DataError: the folder holds none, or several splits.
        OSError, ValueError: one of its files cannot be read.
    """
    import datasets

    if not any((path / name).is_file() for name in ("dataset_info.json", "state.json", "dataset_dict.json")):
        files = sorted(str(file) for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        remedy = f"Give one of its files, such as {files[0]}" if files else "Give a file, or a folder with rows"
        raise DataError([Problem(str(path), "is a folder, and no data set that save_to_disk wrote", remedy)])
    if wrong := [str(file) for file in path.rglob("*") if not (file.is_file() or file.is_dir())]:
        raise DataError([Problem(file, "is no regular file", "Take it out of the data set") for file in wrong])
    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        splits = ", ".join(str(path / name) for name in found)
        raise DataError([Problem(str(path), "holds several splits", f"Give one of them: {splits}")])
    return weighed(path, _values(found))


def from_parquet(path: Path, source: io.BytesIO) -> Iterator[Any]:
    """The rows of a Parquet file: few at a time, as a value that is written once may be that of each.

    Args:
        path: for messages.
        source: the file's content.

    Raises:
        DataError: it has more rows, columns or bytes than are read.
        OSError, ValueError: it cannot be read.
    """
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(source)
    groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
    sizes = [group.column(column).total_uncompressed_size for group in groups for column in range(group.num_columns)]
    check_rows(path, file.metadata.num_rows)
    check_columns(path, file.metadata.num_columns)
    check_bytes(path, sum(sizes))
    at_once = min(max(limit(READ_BYTES) // max([1, *sizes]), 1), 1024)
    batches = file.iter_batches(batch_size=at_once)
    yield from weighed(path, (plain(row) for batch in batches for row in batch.to_pylist()))


def _values(dataset: Dataset) -> Iterator[Any]:
    """A data set's rows: classes by their names, images and sounds not decoded."""
    from datasets import ClassLabel

    for name, kind in dataset.features.items():
        if getattr(kind, "decode", False) and type(kind).__name__ != "Json":
            dataset = dataset.cast_column(name, replace(kind, decode=False))
    classes = {name: kind for name, kind in dataset.features.items() if isinstance(kind, ClassLabel)}
    for row in dataset:
        for name, kind in classes.items():
            if row[name] is not None and row[name] >= 0:  # -1: not labelled
                row[name] = kind.int2str(row[name])
        yield plain(row)


def plain(value: Any) -> Any:
    """A table's value as JSON has it.

    Keys without a value are left out: a table has the same keys in each of its objects, and chat templates ask whether
    a message has one.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value) if isinstance(value, date | time | timedelta | Decimal) else f"<{type(value).__name__}>"
