"""Listing what a store holds, and removing what nobody has used for long."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts.errors import ArtifactMissing
from artifacts.files import size
from artifacts.leases import InUse, Leases
from artifacts.manifest import Manifest

if TYPE_CHECKING:
    from artifacts.store import Store

DAY = 24 * 3600.0
#: A temporary directory not written to for this long belongs to a process that is gone.
STALE_SECONDS = DAY


@dataclass(frozen=True)
class Listed:
    """One object as :meth:`Store.ls` found it; ``problem`` says why one without a manifest cannot be used."""

    key: str
    manifest: Manifest | None
    problem: str | None
    size: int
    last_used: datetime


@dataclass(frozen=True)
class Removal:
    """One thing :meth:`Store.gc` removed, or would remove."""

    path: Path
    #: Key of an object, ``None`` for anything else.
    key: str | None
    stage: str | None
    size: int
    why: str


@dataclass(frozen=True)
class GcReport:
    """What :meth:`Store.gc` removed, or with ``dry_run`` would remove."""

    dry_run: bool
    removals: list[Removal] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes freed."""
        return sum(removal.size for removal in self.removals)


def collect(store: Store, leases: Leases, keep_days: float, dry_run: bool, stages: Collection[str] | None) -> GcReport:
    """What :meth:`artifacts.Store.gc` does."""
    if not keep_days >= 0:
        raise ValueError(f"keep_days must not be negative, got {keep_days}")
    report = GcReport(dry_run)
    before = time.time() - keep_days * DAY
    for listed in store.ls():
        stage = listed.manifest.stage if listed.manifest else None
        used = listed.last_used.timestamp()
        if (stages is not None and stage not in stages) or (listed.problem is None and used > before):
            continue
        why = listed.problem or f"not used for {(time.time() - used) / DAY:.0f} days"
        with leases.settled() as in_use:
            if in_use.holds(listed.key, store.last_used(listed.key).timestamp()):
                continue
            if not dry_run:
                try:
                    store.remove(listed.key)
                except ArtifactMissing:
                    continue
        report.removals.append(Removal(store.path(listed.key), listed.key, stage, listed.size, why))
    if stages is None and store.home.is_dir():
        with leases.settled() as in_use:
            left = [*_unfinished(store.home), *_work(store.home, before, in_use)]
            gone = {removal.key for removal in report.removals}
            left += [*_records(store, in_use, gone), *_locks(store.home)]
            for removal, paths in left:
                report.removals.append(removal)
                for path in () if dry_run else paths:
                    _remove(path)
    return report


#: What is said of some files, and the files.
_Left = tuple[Removal, list[Path]]


def _unfinished(home: Path) -> Iterator[_Left]:
    """What was being written when a process was killed."""
    for path in [*sorted((home / "tmp").glob("*")), *sorted(home.glob(".*.partial"))]:
        if time.time() - _newest(path) >= STALE_SECONDS:
            yield Removal(path, None, None, size(path), "left by an interrupted write"), [path]


def _work(home: Path, before: float, in_use: InUse) -> Iterator[_Left]:
    """Checkpoints of runs that nobody went on with."""
    for path in sorted((home / "work").glob("*")):
        written = _newest(path)
        if written <= before and not in_use.holds(f"work/{path.name}", written):
            days = (time.time() - written) / DAY
            yield Removal(path, None, None, size(path), f"checkpoints not written for {days:.0f} days"), [path]


def _records(store: Store, in_use: InUse, gone: Collection[str | None]) -> Iterator[_Left]:
    """Prefect's records of results that are not in the store."""
    left = [
        path
        for path in (store.home / "results").glob("*")
        if not in_use.holds(path.name, _newest(path)) and (path.name in gone or not _is_there(store, path.name))
    ]
    if left:
        total = sum(size(path) for path in left)
        yield (
            Removal(store.home / "results", None, None, total, f"{len(left)} records of artifacts that are gone"),
            left,
        )


def _is_there(store: Store, name: str) -> bool:
    try:
        return store.path(name).exists()
    except ValueError:  # no key
        return False


def _locks(home: Path) -> Iterator[_Left]:
    """Locks of stages that nobody holds; who takes one looks whether its file is still there."""
    left = []
    for path in (home / "locks").glob("*.lock"):
        if time.time() - _newest(path) < STALE_SECONDS:
            continue
        with contextlib.suppress(OSError), path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.append(path)
    if left:
        yield Removal(home / "locks", None, None, 0, f"{len(left)} locks that nobody holds"), left


def _remove(path: Path) -> None:
    if path.suffix == ".lock":
        with contextlib.suppress(OSError), path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # kept while it is removed
            path.unlink()
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _newest(path: Path) -> float:
    times = []
    for entry in (path, *path.rglob("*")):
        with contextlib.suppress(OSError):
            times.append(entry.stat().st_mtime)
    return max(times, default=0.0)
