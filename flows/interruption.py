"""Ctrl-C, SIGTERM and SIGHUP: the command unwinds, says what was kept, and ends soon, whatever it was computing.

Python runs a signal's handler between two of its own instructions: inside one long call of LAPACK never. So a thread
learns of the signal from the kernel's side (:func:`signal.set_wakeup_fd`), and ends the process where the main thread
does not unwind. What that leaves unfinished is what ``kill -9`` leaves: the kernel frees locks, ``artifacts gc``
removes leftovers, and a watchdog ends Prefect's temporary server.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

#: Seconds in which a stage that is computing must have been left.
STUCK = 0.6
#: Seconds in which everything must have been left.
UNWIND = 5.0

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, where Ctrl-C would raise ``KeyboardInterrupt``."""


def _raise(number: int, _frame: FrameType | None) -> None:
    raise Terminated(number)


def signal_of(error: BaseException) -> signal.Signals:
    """The signal that an interruption came by."""
    return signal.Signals(error.args[0]) if isinstance(error, Terminated) else signal.SIGINT


class Watch:
    """A thread that is told of signals at once, and ends the process where the main thread does not.

    Args:
        computing: whether a stage is computing now.
        last_words: called before the process is ended, with the signal.
    """

    def __init__(self, computing: Callable[[], bool], last_words: Callable[[signal.Signals], object]) -> None:
        self._computing, self._last_words = computing, last_words
        self._over = threading.Event()
        self.unwind = UNWIND
        self._ours, self._kernels = socket.socketpair()
        self._kernels.setblocking(False)
        self._before = signal.set_wakeup_fd(self._kernels.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._wait, name="interruption", daemon=True).start()

    def close(self) -> None:
        """The command has ended by itself."""
        self._over.set()
        signal.set_wakeup_fd(self._before)
        self._kernels.close()

    def _wait(self) -> None:
        while number := self._ours.recv(1):
            if number[0] in _SIGNALS:
                self._end(signal.Signals(number[0]))
                break
        self._ours.close()

    def _end(self, number: signal.Signals) -> None:
        begun = time.monotonic()
        while not self._over.wait(0.05):
            passed = time.monotonic() - begun
            if passed > self.unwind or (passed > STUCK and self.unwind == UNWIND and self._computing()):
                self._last_words(number)
                os._exit(128 + number)


_watch: Watch | None = None


def take_time(seconds: float) -> None:
    """Let this command take so long to unwind: it stops other processes in order."""
    if _watch is not None:
        _watch.unwind = seconds


@contextlib.contextmanager
def interruptible(computing: Callable[[], bool], last_words: Callable[[signal.Signals], object]) -> Iterator[None]:
    """Inside the block signals unwind, and the process ends soon. In the main thread; arguments as :class:`Watch`."""
    global _watch
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # one that is ignored, as under nohup, stays so
            signal.signal(number, _raise)
    _watch = Watch(computing, last_words)
    try:
        yield
    finally:
        _watch.close()
        _watch = None
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is _raise:
                signal.signal(number, signal.SIG_DFL)
