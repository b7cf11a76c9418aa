"""Live progress of a long stage: a Prefect progress artifact, and lines in the run's log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from prefect.logging.loggers import get_run_logger

#: Seconds between two updates.
EVERY = 2.0


#: ``watcher(stage, done, total, text)``: told of every stage (``total`` 0) and of every step of one.
Watcher = Callable[[str, int, int, str], None]
_watchers: list[Watcher] = []


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Have a watcher told how far this process's stages are."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def tell(what: str, done: int = 0, total: int = 0, text: str = "") -> None:
    """Tell the watchers."""
    for watcher in _watchers:
        watcher(what, done, total, text)


def running_stage() -> str:
    """The stage of the running task, with its label in brackets where it has one, as the watchers were told of it."""
    run = TaskRunContext.get()
    if run is None:
        return ""
    label = run.task_run.name.removeprefix(run.task.name).strip()
    return f"{run.task.name} ({label})" if label else run.task.name


class Progress:
    """Shows how far the running stage is. Outside a task run only watchers are told."""

    def __init__(self) -> None:
        self.what = running_stage()
        self._artifact: UUID | None = None
        self._shown = float("-inf")
        self._last = 0
        self._round = 0
        self._in_run = TaskRunContext.get() is not None

    def step(self, done: int, total: int, text: str = "") -> None:
        """``done`` of ``total``; starting over begins a new round."""
        tell(self.what, done, total, text)
        if not self._in_run:
            return
        if done <= self._last:
            self._round += 1
        self._last = done
        if done < total and time.monotonic() - self._shown < EVERY:
            return
        self._shown = time.monotonic()
        told = f"{self.what}: {done} of {total}" + (f" (round {self._round + 1})" if self._round else "")
        told += f", {text}" if text else ""
        get_run_logger().info("%s", told)
        percent = 100.0 * done / max(total, 1)
        if self._artifact is None:
            self._artifact = _identity(create_progress_artifact(percent, description=told))
        else:
            update_progress_artifact(self._artifact, percent, description=told)

    def training(self, step: int, total: int, loss: float) -> None:
        """As :data:`lorasuite.progress.TrainingProgress`."""
        self.step(step, total, f"loss {loss:.4f}")

    def evaluation(self, arm: str, done: int, total: int) -> None:
        """As :data:`lorasuite.progress.EvaluationProgress`."""
        self.step(done, total)


def _identity(value: Any) -> UUID:
    assert isinstance(value, UUID)  # Prefect types it as perhaps awaitable
    return value
