"""How many bytes of checkpoint tensors are alive, and were at most."""

from __future__ import annotations

import weakref

from torch import Tensor


class Meter:
    """Bytes of checkpoint tensors that are alive (``current``) and were at most since the last reset (``peak``)."""

    def __init__(self) -> None:
        """Nothing is alive yet."""
        self.current = 0
        self.peak = 0

    def reset(self) -> None:
        """Let the peak be what is alive now."""
        self.peak = self.current

    def watch(self, tensor: Tensor) -> Tensor:
        """Count a tensor's storage until the last view of it is gone."""
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._release, size)
        return tensor

    def _release(self, size: int) -> None:
        self.current -= size


#: Counts every tensor any checkpoint of this process has loaded.
METER = Meter()
