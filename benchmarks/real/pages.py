"""Markdown that is made: tables, and the places of a page that they go to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(rows: Iterable[Sequence[str]]) -> str:
    """The Markdown of a table, its head and the line under that among the rows."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def between(text: str, begin: str, end: str, made: str) -> str:
    """A page with what was made between two marks of it, in place of what stood there."""
    before, after = text[: text.index(begin)], text[text.index(end) :]
    return f"{before}{begin}\n\n{made}\n\n{after}"
