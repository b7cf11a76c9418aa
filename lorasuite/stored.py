"""What the library asks of a stored artifact: it reads its own things from one, and knows no store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

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
