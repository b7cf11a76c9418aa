"""What living processes use: each has a file of its own, locked as long as it lives, that names what it opened.

The kernel releases the lock when the process dies, however it dies; a file that can be locked is a dead process's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from artifacts.files import private_directory

_GATE = "gate.lock"


@dataclass(frozen=True)
class InUse:
    """What cannot be removed: ``names``, and everything made or read after ``since`` (seconds; the oldest process)."""

    names: frozenset[str]
    since: float

    def holds(self, name: str, touched: float) -> bool:
        """Whether a thing of this name, made or read last at ``touched`` (seconds), is in use."""
        return name in self.names or touched >= self.since


@dataclass
class _Lease:
    descriptor: int
    names: set[str]


#: This process's leases by directory.
_leases: dict[str, _Lease] = {}
_guard = threading.Lock()


def _forget_after_fork() -> None:
    """A forked child would keep its parent's file locked after the parent's end."""
    global _guard
    _guard = threading.Lock()
    give_back()


def give_back() -> None:
    """End what this process uses, as its own end does."""
    with _guard:
        for lease in _leases.values():
            with contextlib.suppress(OSError):
                os.close(lease.descriptor)
        _leases.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


class Leases:
    """The leases of the store under ``home``."""

    def __init__(self, home: Path) -> None:
        self._home, self._directory = home, home / "leases"

    def use(self, name: str) -> None:
        """Say that this process uses a thing, until it ends; before it looks whether it is there.

        Where nothing can be written nothing is said: from there nothing can be removed either.
        """
        with _guard, contextlib.suppress(OSError):
            lease = _leases.get(str(self._directory))
            if lease is not None and name in lease.names:
                return
            with self._gate(fcntl.LOCK_SH):
                if lease is None:
                    path = self._directory / f"{time.time():.6f}-{os.getpid()}-{uuid.uuid4().hex[:8]}.lease"
                    lease = _Lease(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), set())
                    fcntl.flock(lease.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _leases[str(self._directory)] = lease
                os.write(lease.descriptor, f"{name}\n".encode())
            lease.names.add(name)

    @contextlib.contextmanager
    def settled(self) -> Iterator[InUse]:
        """What is in use; nothing more is as long as the block runs. Leases of dead processes are removed."""
        names, since = set[str](), float("inf")
        with self._gate(fcntl.LOCK_EX):
            for path in self._directory.glob("*.lease"):
                with contextlib.suppress(FileNotFoundError), path.open() as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        names.update(file.read().split("\n"))
                        since = min(since, float(path.name.partition("-")[0]))
                    else:
                        path.unlink()
            yield InUse(frozenset(names), since)

    @contextlib.contextmanager
    def _gate(self, how: int) -> Iterator[None]:
        private_directory(self._home)
        self._directory.mkdir(mode=0o700, exist_ok=True)
        with (self._directory / _GATE).open("a") as gate:
            fcntl.flock(gate, how)
            yield
