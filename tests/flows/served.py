"""One Prefect server for all processes of a test run: the first that asks starts it, and it ends after the last.

Who uses it holds a shared lock, which the kernel takes away however a process ends.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

USERS, STARTING, SERVED, LOG = "users", "starting", "served.json", "log"


@contextmanager
def served(folder: Path) -> Iterator[dict[str, Any]]:
    """``api``: the server's address; ``pid``: its process. Everyone who gives the same folder shares it."""
    folder.mkdir(exist_ok=True)
    with (folder / USERS).open("w") as users:
        with (folder / STARTING).open("w") as starting:
            fcntl.flock(starting, fcntl.LOCK_EX)
            fcntl.flock(users, fcntl.LOCK_SH)
            if not (folder / SERVED).exists():
                _start(folder)
        found: dict[str, Any] = json.loads((folder / SERVED).read_text())
        yield found


def _start(folder: Path) -> None:
    with (folder / LOG).open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.flows.served", str(folder)],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    while not (folder / SERVED).exists():
        assert process.poll() is None, (folder / LOG).read_text()
        time.sleep(0.1)


def main(folder: Path) -> None:
    """Serve until nobody holds the lock."""
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    from flows import temporary_server

    temporary_server.watch()  # a test run that is killed leaves no server
    with (
        temporary_settings({PREFECT_HOME: folder / "prefect"}),
        prefect_test_harness(server_startup_timeout=120),
        (folder / USERS).open("w") as users,
    ):
        process = SubprocessASGIServer._instances[None].server_process
        assert process is not None
        partial = folder / f"{SERVED}.partial"
        partial.write_text(json.dumps({"api": PREFECT_API_URL.value(), "pid": process.pid}))
        partial.rename(folder / SERVED)
        fcntl.flock(users, fcntl.LOCK_EX)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
