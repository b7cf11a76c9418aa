"""Columns of other names, read as the fields of a row: ``prompt=text,completion=label``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lorasuite.data._rows import TEMPLATE_ARGUMENTS, Kind
from lorasuite.errors import ConfigError, Problem, did_you_mean

#: The fields of a row of each kind.
KNOWN_KEYS: dict[Kind, frozenset[str]] = {
    "instruction": frozenset({"instruction", "input", "output"}),
    "completion": frozenset({"prompt", "completion", "end_of_answer"}),
    "messages": frozenset({"messages"}),
    "text": frozenset({"text"}),
}
#: Keys by which a row's kind is told.
_SHAPING = frozenset({"conversations"}).union(*KNOWN_KEYS.values())
#: What a column may be read as.
FIELDS = tuple(sorted({*_SHAPING, "system", *TEMPLATE_ARGUMENTS}))
_SPELLING = "Write field=column, such as prompt=text,completion=label."


def parse_columns(pairs: Sequence[str]) -> dict[str, str]:
    """``field=column`` pairs as a mapping of fields to columns.

    Raises:
        ConfigError: naming every pair that is none, whose field no row has, or that names a field again.
    """
    found: dict[str, str] = {}
    problems = []
    for pair in pairs:
        field, equals, column = (part.strip() for part in pair.partition("="))
        if not equals or not field or not column:
            problems.append(Problem("columns", f"{pair!r} is not field=column", _SPELLING))
        elif field not in FIELDS:
            problems.append(Problem("columns", f"no row has a field {field!r}", did_you_mean(field, FIELDS)))
        elif field in found:
            problems.append(Problem("columns", f"{field!r} is named twice", _SPELLING))
        found[field] = column
    if problems:
        raise ConfigError(problems)
    return found


def lacking(record: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """What is said of a record that lacks columns; nothing of one that has the fields themselves."""
    missing = [column for column in columns.values() if column not in record]
    if not missing or columns.keys() <= record.keys():
        return ""
    there = ", ".join(map(repr, list(record)[:8])) or "none"
    return f"has no column {', '.join(map(repr, missing))} (its columns: {there})"


def renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A record whose fields are the columns that are named; one that lacks a column, and has the fields, as it is.

    Other columns that would make it a row of another kind are left out. Numbers become text: a label may be one.
    """
    if any(column not in record for column in columns.values()):
        return dict(record)
    fields = {field: _text(record[column]) for field, column in columns.items()}
    of_its_kind = [keys for keys in KNOWN_KEYS.values() if keys & fields.keys()]
    left_out = {*columns.values(), *(_SHAPING.difference(*of_its_kind) if {*fields} & _SHAPING else ())}
    return fields | {name: value for name, value in record.items() if name not in fields and name not in left_out}


def _text(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
