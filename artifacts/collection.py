"""Listing what a store holds, and removing what nobody has used for long."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts.errors import ArtifactMissing
from artifacts.files import size
from artifacts.manifest import Manifest

if TYPE_CHECKING:
    from artifacts.store import Store

#: A temporary directory not written to for this long belongs to a process that is gone.
STALE_SECONDS = 24 * 3600.0


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
    #: Key of an object, ``None`` for a leftover temporary.
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


def collect(store: Store, temporary: Path, keep_days: float, dry_run: bool, stages: Collection[str] | None) -> GcReport:
    """What :meth:`artifacts.Store.gc` does; ``temporary``: the directory of unfinished writes."""
    if keep_days < 0:
        raise ValueError(f"keep_days must not be negative, got {keep_days}")
    now = time.time()
    report = GcReport(dry_run)
    for listed in store.ls():
        stage = listed.manifest.stage if listed.manifest else None
        if stages is not None and stage not in stages:
            continue
        idle = now - listed.last_used.timestamp()
        if listed.problem is None and idle < keep_days * 86400:
            continue
        why = listed.problem or f"not used for {idle / 86400:.0f} days"
        path = store.path(listed.key)
        if not dry_run:
            try:
                store.remove(listed.key)
            except ArtifactMissing:
                continue
        report.removals.append(Removal(path, listed.key, stage, listed.size, why))
    if stages is None and temporary.is_dir():
        for leftover in sorted(temporary.iterdir()):
            if now - _newest(leftover) < STALE_SECONDS:
                continue
            report.removals.append(Removal(leftover, None, None, size(leftover), "left by an interrupted write"))
            if not dry_run:
                shutil.rmtree(leftover, ignore_errors=True)
    return report


def _newest(path: Path) -> float:
    times = []
    for entry in (path, *path.rglob("*")):
        with contextlib.suppress(OSError):
            times.append(entry.stat().st_mtime)
    return max(times, default=0.0)
