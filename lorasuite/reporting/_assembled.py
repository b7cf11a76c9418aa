"""An output directory that appears only when it is whole."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from lorasuite.errors import OutputError, Problem

logger = logging.getLogger(__name__)

_PARTIAL = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.partial")


@contextlib.contextmanager
def assembled(output: Path) -> Iterator[Path]:
    """A directory beside the output's place, which is renamed into it where the block ends well, and else removed.

    What killed processes left of the same output is removed first.

    Raises:
        OutputError: if there is something in its place.
    """
    if output.exists():
        raise OutputError(Problem(str(output), "exists already", "Give a new directory: nothing is overwritten."))
    output.parent.mkdir(parents=True, exist_ok=True)
    for left in abandoned(output.parent, output.name):
        logger.warning("%s was left by a run that was killed, and is removed", left)
        shutil.rmtree(left, ignore_errors=True)
    scratch = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.partial"
    scratch.mkdir()
    descriptor = os.open(scratch, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # as long as this process lives, where the disk can lock a directory
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield scratch
        for file in (*scratch.rglob("*"), scratch):
            _fsync(file)
        if output.exists():  # an empty directory would be replaced silently
            raise OutputError(Problem(str(output), "appeared meanwhile", "Give another directory."))
        scratch.rename(output)
    finally:
        os.close(descriptor)
        shutil.rmtree(scratch, ignore_errors=True)
    try:
        _fsync(output.parent)
    except OSError as error:  # the output is there, and whole: nothing has failed
        logger.warning("%s could not be flushed to disk (%s)", output.parent, error)


def abandoned(folder: Path, output: str | None = None) -> list[Path]:
    """What killed processes left in a folder of outputs, or of one output there by its name."""
    found = []
    for path in sorted(folder.glob(".*.partial")):
        named = _PARTIAL.fullmatch(path.name)
        if named is None or not path.is_dir() or output not in (None, named["name"]):
            continue
        with contextlib.suppress(OSError):  # somebody has it locked, or it cannot be told whether somebody has
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append(path)
            finally:
                os.close(descriptor)
    return found


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
