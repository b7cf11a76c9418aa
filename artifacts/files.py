"""The files of a stored object: names that stay inside it, copies, and bytes that have reached the disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from artifacts.manifest import FileEntry

logger = logging.getLogger(__name__)

#: The tensors of an object, and the directory of its plain files.
DATA = "data.safetensors"
FILES = "files"


def relative_name(name: str) -> str:
    """``name`` as a relative path with ``/``.

    Raises:
        ValueError: when it would leave the object.
    """
    path = PurePosixPath(name)
    if not name or "\\" in name or "\0" in name or path.is_absolute() or ".." in path.parts or str(path) == ".":
        raise ValueError(f"{name!r} cannot be the name of a file in an artifact")
    return str(path)


def copy_files(files: Mapping[str, Path | bytes], scratch: Path) -> dict[str, FileEntry]:
    """Write plain files under ``scratch``, and say what was written by its path there.

    Args:
        files: by name: their bytes, or a file or directory to copy.

    Raises:
        ValueError: for a name that leaves the object, or that was given twice.
    """
    entries: dict[str, FileEntry] = {}
    for name, source in files.items():
        relative = relative_name(name)
        if isinstance(source, Path) and source.is_dir():
            contents: dict[str, Path | bytes] = {
                f"{relative}/{path.relative_to(source).as_posix()}": path
                for path in sorted(source.rglob("*"))
                if path.is_file()
            }
        else:
            contents = {relative: source}
        for inner, content in contents.items():
            stored = f"{FILES}/{inner}"
            target = scratch / stored
            if target.exists():
                raise ValueError(f"the file {inner!r} was given twice")
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                shutil.copyfile(content, target)
            with target.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            entries[stored] = FileEntry(size=target.stat().st_size, sha256=sha256)
    return entries


#: A directory below a home of this store, by which one is known.
OBJECTS = "objects"


def private_directory(path: Path) -> None:
    """Create a directory that nobody but its owner can enter.

    A home that is there already, as earlier versions made it, is closed to others; one that its group may write to is
    shared on purpose, and stays open to the group. Any other directory stays as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.stat()
    unwanted = found.st_mode & (stat.S_IRWXO if found.st_mode & stat.S_IWGRP else stat.S_IRWXO | stat.S_IRWXG)
    ours = found.st_uid == os.getuid() and not found.st_mode & stat.S_ISVTX and (path / OBJECTS).is_dir()
    if unwanted and ours:
        try:
            path.chmod(stat.S_IMODE(found.st_mode) & ~unwanted)
        except OSError:  # a file system that is read-only
            logger.warning("%s can be read by other users", path)
        else:
            logger.warning("%s could be read by other users: it is closed to them now", path)


def fsync(path: Path) -> None:
    """Flush one file or directory to disk, where its file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot flush a directory
            raise
    finally:
        os.close(descriptor)


def flush(directory: Path) -> None:
    """Flush every file and directory below ``directory`` to disk."""
    for path in sorted(directory.rglob("*")):
        fsync(path)


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a directory; those that vanish meanwhile do not count."""
    total = 0
    for file in path.rglob("*") if path.is_dir() else [path]:
        with contextlib.suppress(OSError):
            if file.is_file():
                total += file.stat().st_size
    return total
