"""Ends processes that this one started once it is gone, however it went: also after ``kill -9``.

A small process of its own reads a pipe whose other end only this process has. The kernel closes that end with the
process; what is named by then and was not released is terminated, and killed where it does not end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

#: Seconds between SIGTERM and SIGKILL.
GRACE = 3.0

_guard = threading.Lock()
_pipe: int | None = None
_owner = 0


def keep(pid: int) -> None:
    """End the process ``pid`` when this one is gone; where it leads a group of processes, all of them."""
    _write(f"+{pid}\n")


def release(pid: int) -> None:
    """Leave alone a process that has ended by itself: its number may become another's."""
    if _pipe is not None:
        _write(f"-{pid}\n")


def _write(line: str) -> None:
    global _pipe, _owner
    with _guard:
        if _pipe is None or _owner != os.getpid():
            _pipe, _owner = _start(), os.getpid()
        os.write(_pipe, line.encode())


def _start() -> int:
    reading, writing = os.pipe()
    try:
        subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__))],
            stdin=reading,
            stdout=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # Ctrl-C does not reach it
        )
    finally:
        os.close(reading)
    return writing


def _forget_after_fork() -> None:
    """A forked child has a copy of the pipe's end, and would keep it open when this process is gone."""
    global _guard, _pipe
    _guard = threading.Lock()
    if _pipe is not None:
        with contextlib.suppress(OSError):
            os.close(_pipe)
    _pipe = None


os.register_at_fork(after_in_child=_forget_after_fork)


def main() -> None:
    """Read names until the pipe is closed; then end what is left, last started first."""
    kept: dict[int, int | None] = {}
    for line in sys.stdin:
        pid = int(line[1:])
        handle = kept.pop(pid, None)
        if handle is not None:
            os.close(handle)
        if line[0] == "+":
            with contextlib.suppress(ProcessLookupError):
                kept[pid] = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
    # a process that has ended is not signalled: its number may be another's by now
    left = [
        pid for pid, handle in reversed(kept.items()) if handle is None or not select.select([handle], [], [], 0)[0]
    ]
    left = [pid for pid in left if _signal(pid, signal.SIGTERM)]
    deadline = time.monotonic() + GRACE
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [pid for pid in left if _signal(pid, 0)]
    for pid in left:
        _signal(pid, signal.SIGKILL)


def _runs(handle: int | None) -> bool:
    return handle is None or not select.select([handle], [], [], 0)[0]


def _signal(pid: int, number: int) -> bool:
    """Send a signal to a process, or to the group it leads; whether there is one."""
    try:
        os.killpg(pid, number)
    except OSError:
        try:
            os.kill(pid, number)
        except OSError:
            return False
    return True


if __name__ == "__main__":
    main()
