"""How much of a source of rows is read: a small file may stand for any number of bytes and rows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lorasuite.errors import ConfigError, DataError, Problem

#: What environment variables may set otherwise: bytes of a file, unpacked, and rows of a source.
READ_BYTES, READ_ROWS = "LORASUITE_READ_BYTES", "LORASUITE_READ_ROWS"
DEFAULTS = {READ_BYTES: 2**29, READ_ROWS: 1_000_000}
#: Columns of a table.
MOST_COLUMNS = 10_000
#: Problems after which a source is read no further.
MOST_PROBLEMS = 10_000


def limit(name: str) -> int:
    """A limit, as the environment or :data:`DEFAULTS` has it.

    Raises:
        ConfigError: if the environment sets no whole number above zero.
    """
    given = os.environ.get(name, "").strip()
    if not given:
        return DEFAULTS[name]
    if not given.isdecimal() or int(given[:20]) < 1:
        raise ConfigError(
            Problem(name, f"is {given!r:.40}, and no whole number above zero", "Set another, or unset it.")
        )
    return int(given[:20])


def check_bytes(where: object, count: int) -> None:
    """
    Raises:
        DataError: if a source has more bytes, unpacked, than are read.
    """
    _check(READ_BYTES, where, count, "bytes, unpacked")


def check_rows(where: object, count: int) -> None:
    """
    Raises:
        DataError: if a source has more rows than are read.
    """
    _check(READ_ROWS, where, count, "rows")


def _check(name: str, where: object, count: int, of: str) -> None:
    if count > (most := limit(name)):
        remedy = f"Take a part of it, or set the environment variable {name}."
        raise DataError(Problem(str(where), f"has more than {most:,} {of}", remedy))


def check_columns(where: object, count: int) -> None:
    """
    Raises:
        DataError: if a table has more columns than are read.
    """
    if count > MOST_COLUMNS:
        raise DataError(Problem(str(where), f"has more than {MOST_COLUMNS:,} columns", "Take those that rows are of."))


def counted(where: object, rows: Iterator[Any]) -> Iterator[Any]:
    """The rows.

    Raises:
        DataError: after as many as are read, if there are more.
    """
    most = limit(READ_ROWS)
    for number, row in enumerate(rows, start=1):
        if number > most:
            check_rows(where, number)
        yield row


def weighed(where: object, rows: Iterable[Any]) -> Iterator[Any]:
    """The rows of a table, in which a text that is written once may be that of many.

    Raises:
        DataError: after as many bytes as are read, if there are more.
    """
    most, read = limit(READ_BYTES), 0
    for row in rows:
        read += _size(row)
        if read > most:
            check_bytes(where, read)
        yield row


def _size(value: Any) -> int:
    """About how many bytes a value has when it is written."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_size(item) + 8 for item in value.values())
    return sum(map(_size, value)) + 8 if isinstance(value, list) else 8


def enough(problems: list[Problem], where: object) -> bool:
    """Whether there are so many problems that the source is read no further, which is then said."""
    if len(problems) < MOST_PROBLEMS:
        return False
    problems.append(Problem(str(where), "was read no further", "Mend what is said of it first."))
    return True
