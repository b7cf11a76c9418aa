"""Loaded models, kept from one caller of the process to the next within a memory budget.

A model is lent to one caller at a time. A second one that asks for it meanwhile, in the same thread or another, gets a
load of its own: waiting could deadlock (two threads, each with one base and asking for the other's), and sharing would
let one see the adapter that the other has attached.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorasuite.bases._files import Weights, resolve
from lorasuite.bases._loading import BUILDING, DEFAULT, known_dtype, load_model
from lorasuite.bases._memory import ram
from lorasuite.bases._settings import LoadSettings
from lorasuite.errors import CheckpointError, ConfigError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Environment variable: bytes of loaded models kept on each device; 0 keeps none.
BUDGET = "LORASUITE_MODEL_CACHE_BYTES"
#: Files of a model directory that decide what is loaded from it.
LOADED = (".json", ".safetensors", ".bin", ".py")


@dataclass(eq=False)
class _Kept:
    """A model that is lent or waits for its next caller, and the bytes of its weights."""

    key: tuple[object, ...]
    device: torch.device
    size: int
    lent: bool = True
    model: Any = None


class ModelCache:
    """Loaded models that wait for their next caller; safe to use from several threads.

    Attributes:
        budget: bytes of models kept on each device, lent ones included; 0 keeps none. None takes
            ``LORASUITE_MODEL_CACHE_BYTES`` or, where that is not set, half of the memory there is for the process
            (on a GPU half of what is free or held by it), and one model that is larger alone.
    """

    def __init__(self, budget: int | None = None) -> None:
        """An empty cache."""
        self.budget = budget
        self._models: list[_Kept] = []  # least recently used first
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def loaded(
        self,
        source: str | Path,
        device: str | torch.device = "cpu",
        *,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        keep: bool = True,
        loading: LoadSettings = DEFAULT,
    ) -> Iterator[PreTrainedModel]:
        """The whole model as :func:`load_model` gives it, loaded before or now; kept afterwards for the next caller.

        It must be given back as it came: adapters detached, flags, mode and weights restored
        (:func:`lorasuite.adapters.attached` and :func:`lorasuite.adapters.restored` do that). One whose modules,
        flags, hooks, configuration or tensors are seen to differ is not kept.

        Args:
            source: a local directory or ``hub-id[/subfolder][@revision]``.
            dtype: goes before that of ``loading``; None in both means that of the checkpoint, which on a CPU without
                instructions for bfloat16, or where it is another, is float32.
            keep: False for a caller that changes the weights: the model is not kept afterwards.
            loading: precision, quantization while loading, and devices. Models that differ in it are kept apart.

        Raises:
            CheckpointError: if it cannot be loaded.
            ConfigError: if ``LORASUITE_MODEL_CACHE_BYTES`` is no number of bytes, or for quantization while loading
                that this machine cannot do.
        """
        kept = self._take(resolve(source), _indexed(device), dtype, trust_remote_code, loading)
        before = _state(kept.model) if keep else None
        try:
            yield kept.model
        finally:
            intact = keep and _state(kept.model) == before
            with self._lock:
                kept.lent = False
                if intact:
                    self._models.append(self._models.pop(self._models.index(kept)))
                else:
                    self._models.remove(kept)
                self._make_room(kept.device, beside=kept)

    def holds(
        self,
        source: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
    ) -> bool:
        """Whether :meth:`loaded` would give a model that is loaded already, at the moment."""
        key = _key(resolve(source), _indexed(device), dtype, trust_remote_code)
        with self._lock:
            return any(kept.key == key and not kept.lent for kept in self._models)

    def release(self) -> None:
        """Drop every model that is not lent."""
        with self._lock:
            self._drop([kept for kept in self._models if not kept.lent])

    def _take(
        self, path: Path, device: torch.device, dtype: torch.dtype | None, trust: bool, loading: LoadSettings
    ) -> _Kept:
        key = _key(path, device, dtype, trust, loading)
        with self._lock:
            for kept in self._models:
                if kept.key == key and not kept.lent:
                    kept.lent = True
                    return kept
            kept = _Kept(key, device, _expected_bytes(path, key[3]))
            self._models.append(kept)
            self._make_room(device, beside=kept)
        try:
            with BUILDING:
                kept.model = load_model(path, str(device), dtype, trust, loading)
        except BaseException:
            with self._lock:
                self._models.remove(kept)
            raise
        kept.size = _bytes(kept.model)
        return kept

    def _make_room(self, device: torch.device, beside: _Kept) -> None:
        """Drop models of a device that are not lent, least recently used first, until the budget holds.

        Args:
            beside: the model that is about to be loaded or was used last. It too is dropped, where it is not lent,
                if it alone exceeds a budget that was set.
        """
        budget, strict = self._limit(device)
        here = [kept for kept in self._models if kept.device == device]
        idle = [kept for kept in here if not kept.lent and (strict or kept is not beside)]
        excess = sum(kept.size for kept in here) - budget
        dropped = []
        while excess > 0 and idle:
            dropped.append(idle.pop(0))
            excess -= dropped[-1].size
        self._drop(dropped)

    def _limit(self, device: torch.device) -> tuple[int, bool]:
        """The budget in bytes, and whether it was set."""
        if self.budget is not None:
            return self.budget, True
        told = os.environ.get(BUDGET)
        if told is None:
            return _memory(device) // 2, False
        if not told.isdecimal():
            raise ConfigError(Problem(BUDGET, f"is no number of bytes: {told!r}", "Give a whole number, such as 0."))
        return int(told), True

    def _drop(self, dropped: list[_Kept]) -> None:
        if not dropped:
            return
        self._models = [kept for kept in self._models if kept not in dropped]
        devices = {kept.device.type for kept in dropped}
        for kept in dropped:
            kept.model = None
        gc.collect()  # a model that was trained lies in reference cycles
        if "cuda" in devices:
            torch.cuda.empty_cache()


#: The cache of this process.
model_cache = ModelCache()


def loaded_model(
    source: str | Path,
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    keep: bool = True,
    loading: LoadSettings = DEFAULT,
) -> contextlib.AbstractContextManager[PreTrainedModel]:
    """A model of this process's cache while the context lasts: see :meth:`ModelCache.loaded`.

    Raises:
        CheckpointError: if it cannot be loaded.
        ConfigError: if ``LORASUITE_MODEL_CACHE_BYTES`` is no number of bytes, or for quantization while loading that
            this machine cannot do.
    """
    return model_cache.loaded(
        source, device, dtype=dtype, trust_remote_code=trust_remote_code, keep=keep, loading=loading
    )


def release_models() -> None:
    """Drop every model of this process's cache that is not lent."""
    model_cache.release()


def _indexed(device: str | torch.device) -> torch.device:
    """The device with its index: ``cuda`` is the current one of them."""
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else torch.device(device)


def _key(
    path: Path, device: torch.device, dtype: torch.dtype | None, trust: bool, loading: LoadSettings = DEFAULT
) -> tuple[object, ...]:
    """What tells one load from another."""
    known = known_dtype(path, device, dtype or loading.torch_dtype)
    asked = (loading.device_map, loading.load_in_4bit, loading.load_in_8bit)
    return (str(path), _identity(path), str(device), known, trust, *asked)


def _identity(path: Path) -> tuple[object, ...]:
    """The files a model is loaded from, each with its size, modification time (ns) and inode."""
    files = ((file, file.stat()) for file in sorted(path.iterdir()) if file.suffix in LOADED and file.is_file())
    return tuple((file.name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for file, stat in files)


def _expected_bytes(path: Path, dtype: object) -> int:
    """Bytes that a model will take: its elements in the dtype, or the size of its files where either is not known."""
    try:
        weights = Weights(path)
        if isinstance(dtype, torch.dtype):
            return sum(torch.Size(shape).numel() for shape in weights.shapes().values()) * dtype.itemsize
        return sum(file.stat().st_size for file in weights.weight_files)
    except (CheckpointError, OSError):  # the load says what is wrong, or reads what is no safetensors file
        return sum(file.stat().st_size for file in path.glob("*.bin"))


def _bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers, tied ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _memory(device: torch.device) -> int:
    """Bytes there are for this process: free or held by it on a GPU, else the machine's or its control group's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    return ram()


def _state(model: Any) -> list[object]:
    """What a caller can leave changed in a model: modules, flags, hooks, configuration and tensors.

    A tensor counts as changed by its place and its version, not by its values, which would cost reading them.
    """
    modules = [
        (name, id(module), type(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    tensors = [
        (name, tensor.data_ptr(), tensor._version, tensor.dtype, tensor.requires_grad, tensor.grad is None)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]
    configured = [config and config.to_dict() for config in (model.config, getattr(model, "generation_config", None))]
    return [modules, tensors, configured, hasattr(model, "peft_config")]
