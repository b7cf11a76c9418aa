"""The RAM there is for this process, and what of it is free: of the machine, or of its control group."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

#: Where Linux says how much memory the process's control group may use and does use (versions 2 and 1).
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def ram() -> int:
    """Bytes of RAM that there are for this process, whoever has them now."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, _, _ in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            there = min(there, int(Path(limit).read_text()))
    return there


def free_ram() -> int:
    """Bytes of RAM that this process can still take; caches of files count as free, which are given back."""
    import psutil

    free = min(int(psutil.virtual_memory().available), ram())
    for limit, used, details in CGROUPS:
        with contextlib.suppress(OSError, ValueError, KeyError):  # no such file, or "max"
            stat = dict(line.split() for line in Path(details).read_text().splitlines())
            held = int(Path(used).read_text()) - int(stat["inactive_file"])
            free = min(free, int(Path(limit).read_text()) - held)
    return max(free, 0)
