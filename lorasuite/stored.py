"""What the library asks of a stored artifact, of which it reads its own things and knows no store; and how it writes a
file that others read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Stored(Protocol):
    """An artifact that can be read: results that are JSON data, and tensors by name."""

    @property
    def info(self) -> Mapping[str, Any]:
        """The results that are no tensors."""

    def keys(self) -> Sequence[str]:
        """The names of the tensors."""

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside ``path`` to write a file at, which takes that of ``path`` in one step once it is on disk.

    Whoever reads ``path`` finds the old file or the new one, whole, whatever ends the writer. Where writing fails
    nothing is left. For one writer at a time: two would share the place.

    Raises:
        OSError: where it cannot be written; ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    try:
        yield scratch
        with scratch.open("rb") as written:
            os.fsync(written.fileno())
        scratch.replace(path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text file by :func:`replacing`, in UTF-8."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
