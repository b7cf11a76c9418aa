"""A configuration file to begin with: every setting with its default, its meaning and its place."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lorasuite.planning._config import MigrationConfig
from lorasuite.planning._headings import FIRST, HEADINGS

WIDTH = 110


def draft_config(values: Mapping[str, Any], notes: Sequence[str] = ()) -> str:
    """A ``--config`` file of a migration: what is given set, everything else commented out at its default.

    A line that begins with ``#`` and no space behind it is a setting, to be switched on by taking the ``#`` away.

    Args:
        values: settings by name.
        notes: what is known of the two bases and the adapter.
    """
    lines = [
        "# A migration: `lorasuite inspect --config FILE` checks it, `lorasuite migrate --config FILE` runs it.",
        "# Settings behind a # are at their defaults; take it away to change one, of nested ones the head's too.",
        *(f"# {line}" for note in notes for line in textwrap.wrap(note, WIDTH)),
    ]
    for heading, names in {"What everyone needs": FIRST, **HEADINGS}.items():
        lines += ["", f"# --- {heading} ---"]
        for name in names:
            lines += ["", *_setting(name, MigrationConfig.model_fields[name], values)]
    return "\n".join(lines) + "\n"


def _setting(name: str, info: FieldInfo, values: Mapping[str, Any]) -> Iterator[str]:
    nested = info.annotation
    if isinstance(nested, type) and issubclass(nested, BaseModel):
        given = values.get(name, {})
        head, inside = ("", "") if given else ("#", "#")
        yield f"{head}{name}:"
        for part, field in nested.model_fields.items():
            yield from (f"{inside}  # {line}" for line in _meaning(field))
            if part in given:
                yield f"  {part}: {_shown(given[part])}"
            else:
                yield f"#  {part}: {_shown(field.default)}"
        return
    yield from (f"# {line}" for line in _meaning(info))
    if name in values:
        yield f"{name}: {_shown(values[name])}"
    else:
        yield f"#{name}: {_shown(None if info.is_required() else info.default)}"


def _meaning(info: FieldInfo) -> list[str]:
    return textwrap.wrap(info.description or "", WIDTH)


def _shown(value: Any) -> str:
    """A value as YAML, on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000, allow_unicode=True).removesuffix("...\n").strip()


def output_name(adapter: str, new_base: str) -> str:
    """A directory for an adapter on a new base, named after both."""
    parts = [re.sub(r"[^\w.-]+", "-", Path(source.partition("@")[0]).name) or "new" for source in (adapter, new_base)]
    return "-on-".join(parts)
