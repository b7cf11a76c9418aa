"""Whether the directories that a stage reads are still what they were when their content was fingerprinted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from lorasuite.bases import digest_json, stamp
from lorasuite.errors import InputChanged, Problem

#: Of a model or adapter, its own files count and the adapter before training; other directories lie below it, too.
_MODEL = ("config.json", "adapter_config.json")


def folder_files(path: Path) -> Iterator[Path]:
    """The files of a directory that count as its content, in order; what Python compiled is none of it."""
    model = any((path / name).is_file() for name in _MODEL)
    found = [*path.glob("*"), *path.glob("*_init/*")] if model else path.rglob("*")
    yield from sorted(file for file in found if file.is_file() and file.parent.name != "__pycache__")


def folder_stamp(path: Path) -> str:
    """A digest of what every file of a directory looks like from outside; empty where there is no directory."""
    if not path.is_dir():
        return ""
    return digest_json({str(file.relative_to(path)): stamp(file) for file in folder_files(path)})


def check_unchanged(stamps: Mapping[Path, str]) -> None:
    """Look at directories again.

    Args:
        stamps: of directories, by :func:`folder_stamp`; an empty one is not compared.

    Raises:
        InputChanged: naming every directory that differs.
    """
    problems = [
        Problem(str(path), "changed while it was read", "What was computed of it is not kept: run again.")
        for path, before in stamps.items()
        if before and folder_stamp(path) != before
    ]
    if problems:
        raise InputChanged(problems)
