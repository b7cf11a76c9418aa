"""Writes that fail on purpose: the n-th one, whichever it is."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

#: What a write consists of: functions of ``os`` and how a path is opened.
CALLS = ("mkdir", "rename", "replace", "fsync")


class Faults:
    """Counts writes below a directory, and has one of them fail."""

    def __init__(self, below: Path, at: int, code: int = errno.ENOSPC) -> None:
        self.below, self.at, self.code = str(below), at, code
        self.count = 0
        #: The call that failed.
        self.failed: str | None = None

    def _step(self, what: str) -> None:
        self.count += 1
        if self.count == self.at:
            self.failed = what
            raise OSError(self.code, os.strerror(self.code), what)

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **named: Any) -> Any:
            place = f"/proc/self/fd/{target}" if isinstance(target, int) else target
            if str(Path(place).resolve() if isinstance(target, int) else target).startswith(self.below):
                self._step(f"{name} {target}")
            return original(target, *args, **named)

        return call

    @contextlib.contextmanager
    def injected(self) -> Iterator[None]:
        """Inside the block the write fails."""
        opened = Path.open

        def open_(path: Path, mode: str = "r", *args: Any, **named: Any) -> Any:
            if str(path).startswith(self.below) and set(mode) & set("wax+"):
                self._step(f"open {path}")
            return opened(path, mode, *args, **named)

        with contextlib.ExitStack() as stack:
            for name in CALLS:
                stack.enter_context(patch.object(os, name, self._wrapped(name, getattr(os, name))))
            stack.enter_context(patch.object(Path, "open", open_))
            yield


#: Told of a fault, and of what the attempt raised.
After = Callable[[Faults, BaseException | None], None]


def every_fault(below: Path, attempt: Callable[[], object], after: After, code: int = errno.ENOSPC) -> int:
    """Try something with its first write failing, with its second, and so on until none fails; how many failed.

    Args:
        after: called behind each fault; it looks what is there, and restores what the next attempt begins with.
    """
    number = 0
    while True:
        number += 1
        faults, raised = Faults(below, number, code), None
        try:
            with faults.injected():
                attempt()
        except OSError as error:
            raised = error
        if faults.failed is None:
            if raised is not None:
                raise raised
            return number - 1
        after(faults, raised)
