"""A lock manager for Prefect transactions that survives ``kill -9``: ``flock`` on one file per key."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from prefect.locking.protocol import LockManager
from prefect.logging import get_logger

from artifacts import private_directory

logger = get_logger("lorasuite.locks")


class _Hold(NamedTuple):
    holder: str
    descriptor: int
    timer: threading.Timer | None


# What this process holds, by lock file. Not a field of the manager: Prefect copies cache policies, and their
# managers, freely, and a lock taken through one copy is released through another.
_holds: dict[str, _Hold] = {}
_guard = threading.Lock()


def _forget_after_fork() -> None:
    """A forked child shares its parent's locks; closing its copies leaves them to the parent alone.

    Otherwise a data loader's worker that outlives a killed parent would keep the lock.
    """
    global _guard
    _guard = threading.Lock()
    for hold in _holds.values():
        with contextlib.suppress(OSError):
            os.close(hold.descriptor)
    _holds.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


class FileLockManager(LockManager):
    """Prefect's lock manager protocol on ``flock``.

    The kernel releases a lock when its process dies, however it dies. Lock files stay behind until ``artifacts gc``
    removes those that nobody holds: who takes one looks whether its file is still that of its name. Works between the
    processes of one machine, and on shared file systems that implement ``flock``.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = str(Path(directory).expanduser().absolute())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FileLockManager) and other.directory == self.directory

    def __hash__(self) -> int:
        return hash(self.directory)

    def _path(self, key: str) -> str:
        # hashed: a key may be longer than a file name, or hold a slash
        return str(Path(self.directory, hashlib.sha256(key.encode()).hexdigest() + ".lock"))

    def _try(self, key: str, holder: str, hold_timeout: float | None) -> bool:
        path = self._path(key)
        with _guard:
            held = _holds.get(path)
            if held is not None:
                return held.holder == holder
            private_directory(Path(self.directory).parent)
            Path(self.directory).mkdir(exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            except BaseException:
                os.close(descriptor)
                raise
            if not _is_at(descriptor, path):  # `artifacts gc` removed the file in between: this locks nothing
                os.close(descriptor)
                return False
            timer = None
            if hold_timeout is not None:
                timer = threading.Timer(hold_timeout, self._expire, (key, holder))
                timer.daemon = True
                timer.start()
            _holds[path] = _Hold(holder, descriptor, timer)
            return True

    def _expire(self, key: str, holder: str) -> None:
        with contextlib.suppress(ValueError):
            self.release_lock(key, holder)

    def acquire_lock(
        self,
        key: str,
        holder: str,
        acquire_timeout: float | None = None,
        hold_timeout: float | None = None,
    ) -> bool:
        """Take the lock, waiting for at most ``acquire_timeout`` seconds. Returns whether ``holder`` has it."""
        for pause in _pauses(key, acquire_timeout):
            if self._try(key, holder, hold_timeout):
                return True
            time.sleep(pause)
        return self._try(key, holder, hold_timeout)

    async def aacquire_lock(
        self,
        key: str,
        holder: str,
        acquire_timeout: float | None = None,
        hold_timeout: float | None = None,
    ) -> bool:
        """As :meth:`acquire_lock`, without blocking the event loop."""
        for pause in _pauses(key, acquire_timeout):
            if self._try(key, holder, hold_timeout):
                return True
            await asyncio.sleep(pause)
        return self._try(key, holder, hold_timeout)

    def release_lock(self, key: str, holder: str) -> None:
        """Give the lock back. Raises ``ValueError`` when ``holder`` does not have it."""
        with _guard:
            path = self._path(key)
            held = _holds.get(path)
            if held is None or held.holder != holder:
                raise ValueError(f"{holder} holds no lock for {key}")
            del _holds[path]
            if held.timer is not None:
                held.timer.cancel()
            try:
                # explicitly: a child process may have inherited the descriptor, and would keep the lock alive
                fcntl.flock(held.descriptor, fcntl.LOCK_UN)
            finally:
                os.close(held.descriptor)

    def is_locked(self, key: str) -> bool:
        """Whether anyone, in any process, holds the lock."""
        path = self._path(key)
        with _guard:
            if path in _holds:
                return True
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                return False
            try:
                # shared: two processes that only look do not take each other for a holder
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            else:
                return False
            finally:
                os.close(descriptor)

    def is_lock_holder(self, key: str, holder: str) -> bool:
        """Whether ``holder``, in this process, holds the lock."""
        with _guard:
            held = _holds.get(self._path(key))
            return held is not None and held.holder == holder

    def wait_for_lock(self, key: str, timeout: float | None = None) -> bool:
        """Wait until nobody holds the lock. Returns ``False`` when that took longer than ``timeout`` seconds."""
        for pause in _pauses(key, timeout):
            if not self.is_locked(key):
                return True
            time.sleep(pause)
        return not self.is_locked(key)

    async def await_for_lock(self, key: str, timeout: float | None = None) -> bool:
        """As :meth:`wait_for_lock`, without blocking the event loop."""
        for pause in _pauses(key, timeout):
            if not self.is_locked(key):
                return True
            await asyncio.sleep(pause)
        return not self.is_locked(key)


def _is_at(descriptor: int, path: str) -> bool:
    """Whether an open file is the one of this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), Path(path).stat())
    except FileNotFoundError:
        return False


def _pauses(key: str, timeout: float | None) -> Iterator[float]:
    """Seconds to sleep between attempts, growing to half a second, until ``timeout`` is over."""
    deadline = None if timeout is None else time.monotonic() + timeout
    pause = 0.02
    while True:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return
        yield pause if left is None else min(pause, left)
        if pause < 0.5 <= pause * 1.5:
            logger.info("another run is computing %s; waiting for it", key)
        pause = min(pause * 1.5, 0.5)
