"""What a stage's run cost: seconds and peak memory, and the runs of a flow in their order."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar, Token
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from prefect.exceptions import MissingContextError
from prefect.logging import get_logger
from prefect.logging.loggers import get_run_logger


def run_log() -> Any:
    """The log of the run that goes on; outside of runs, lorasuite's own."""
    try:
        return get_run_logger()
    except MissingContextError:
        return get_logger("lorasuite")


@dataclass(frozen=True)
class StageRun:
    """One call of :meth:`tasks.stage.Stage.run` that succeeded."""

    stage: str
    label: str | None
    key: str
    #: Nothing was computed.
    cached: bool
    #: Wall-clock seconds of this call.
    seconds: float
    #: Of the computation, whenever it was: ``seconds``, ``max_rss_bytes`` and, on a GPU, ``max_cuda_bytes``.
    computed: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return asdict(self)


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


class Recorder:
    """Collects a :class:`StageRun` for every stage run inside ``with Recorder() as timings:``, in ``runs``."""

    def __init__(self) -> None:
        self.runs: list[StageRun] = []
        self._tokens: list[Token[Recorder | None]] = []

    def __enter__(self) -> Recorder:
        self._tokens.append(_recorder.set(self))
        return self

    def __exit__(self, *exc: object) -> None:
        _recorder.reset(self._tokens.pop())


def current_recorder() -> Recorder | None:
    """The innermost :class:`Recorder` that is collecting, if any."""
    return _recorder.get()


class Measure:
    """Seconds and peak memory from construction until the last tensor has been taken, in ``results``."""

    def __init__(self) -> None:
        self.results: dict[str, Any] = {}
        self._begun = time.perf_counter()
        _give_back()
        _forget_peak()
        self._cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        if self._cuda:
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)

    def through(
        self, tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors by name, one at a time; ``results`` is filled in after the last."""
        yield from tensors.items() if isinstance(tensors, Mapping) else tensors
        self.results["seconds"] = round(time.perf_counter() - self._begun, 6)
        # of the whole process: since the stage began on Linux, since the process began elsewhere. macOS counts bytes,
        # Linux KiB.
        unit = 1 if sys.platform == "darwin" else 1024
        self.results["max_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.results["max_cuda_bytes"] = max(
                torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count())
            )


def _give_back() -> None:
    """Hand the kernel what was freed, which glibc keeps: gigabytes, after a few stages that run models."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> None:
    """Start the process's peak of resident memory anew, where the kernel can (Linux; see proc(5), clear_refs)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
