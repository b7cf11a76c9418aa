"""Names of directories as users give them."""

from __future__ import annotations

from pathlib import Path


def is_directory(source: str | Path) -> bool:
    """Whether a directory of that name is here; a text that can be no path is none."""
    try:
        return Path(source).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # longer than file names are, a loop of links, the home of nobody, NUL
        return False


def is_file(source: str | Path) -> bool:
    """Whether a regular file of that name is here; as :func:`is_directory`."""
    try:
        return Path(source).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):
        return False
