"""What ``--adapter`` names: one adapter, or several joined by commas, each with an optional weight."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from lorasuite.bases import is_directory

_WEIGHTED = re.compile(r"(.+):(-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")


def split_sources(text: str) -> list[tuple[str, float]]:
    """``a:0.7,b`` as ``[("a", 0.7), ("b", 1.0)]``; the name of a directory that exists as it is."""
    if is_directory(text):
        return [(text, 1.0)]
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = None if is_directory(part) else _WEIGHTED.fullmatch(part)
        found.append((match[1], float(match[2])) if match else (part, 1.0))
    return found or [(text, 1.0)]


def sources(text: str) -> list[str]:
    """The directories or Hub ids that are named, without their weights."""
    return [source for source, _ in split_sources(text)]


def sources_name(text: str) -> str:
    """The last parts of the directories or ids, joined by ``+``: a name to show, and of a directory."""
    return "+".join(Path(source).name or source for source in sources(text))


def replace_sources(text: str, place: Callable[[str], str]) -> str:
    """The same sum with each directory or id replaced by what ``place`` makes of it."""
    found = split_sources(text)
    if len(found) == 1 and found[0][1] == 1:
        return place(found[0][0])
    return ",".join(f"{place(source)}:{weight!r}" for source, weight in found)
