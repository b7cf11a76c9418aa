"""Prefect's temporary server, which ends with the process that started it, however that one ends."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import prefect
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import get_current_settings

from flows import watchdog


def watch() -> None:
    """Have Prefect start its temporary servers by :func:`start`."""
    SubprocessASGIServer._run_uvicorn_command = start  # type: ignore[method-assign, assignment]


def start(server: SubprocessASGIServer) -> subprocess.Popen[Any]:
    """Start the server as Prefect does (``SubprocessASGIServer._run_uvicorn_command``), and have it watched.

    It has a session of its own: Ctrl-C ends the run first, which still has to say so to the server.
    """
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(prefect.__module_path__.parent)]
    command += ["--factory", "prefect.server.api.server:create_app", "--host", "127.0.0.1", "--port", str(server.port)]
    process = subprocess.Popen(
        [*command, "--log-level", "error", "--lifespan", "on"],
        env={
            **os.environ,
            "PREFECT_UI_ENABLED": "0",
            "PREFECT__SERVER_EPHEMERAL": "1",
            "PREFECT__SERVER_FINAL": "1",
            **get_current_settings().to_environment_variables(exclude_unset=True),
        },
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    watchdog.keep(process.pid)
    return process
