"""Servers that commands start, and how a run that was stopped leaves them."""

from __future__ import annotations

import os

import psutil
from prefect.server.api.server import SubprocessASGIServer

from flows import temporary_server


def test_the_temporary_server_is_watched(prefect_server: str) -> None:
    """The one of these tests was started by Prefect, in our way: in its own session, and known to a watchdog."""
    server = SubprocessASGIServer._instances[None]
    assert SubprocessASGIServer._run_uvicorn_command is temporary_server.start
    process = server.server_process
    assert process is not None and os.getsid(process.pid) == process.pid
    beside = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    assert any("watchdog.py" in command for command in beside)
