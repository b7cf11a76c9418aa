"""Prefect's temporary server: it answers this process alone, and ends with it, however this one ends."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from typing import Any

import prefect
import prefect.context
from prefect.context import SettingsContext
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_SERVER_API_AUTH_STRING, get_current_settings

from flows import watchdog


def watch() -> None:
    """Have Prefect start its temporary servers by :func:`start`."""
    SubprocessASGIServer._run_uvicorn_command = start  # type: ignore[method-assign, assignment]


def start(server: SubprocessASGIServer) -> subprocess.Popen[Any]:
    """Start the server as Prefect does (``SubprocessASGIServer._run_uvicorn_command``), and have it watched.

    It has a session of its own: Ctrl-C ends the run first, which still has to say so to the server. It answers to a
    secret of this process: who else could reach it might tell the run that a task is done, and where its result lies.
    """
    _lock()
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


def _lock() -> None:
    """Have this process's clients show a secret that its server asks for.

    Prefect reads its settings when it is imported. Where others are in force for a time, as in tests, they stay.
    """
    context = SettingsContext.get()
    if context is not prefect.context.GLOBAL_SETTINGS_CONTEXT:
        return
    secret = PREFECT_API_AUTH_STRING.value() or f"lorasuite:{secrets.token_urlsafe(32)}"
    updates: dict[Any, Any] = {PREFECT_API_AUTH_STRING: secret, PREFECT_SERVER_API_AUTH_STRING: secret}
    settings = context.settings.copy_with_update(updates=updates)
    prefect.context.GLOBAL_SETTINGS_CONTEXT = SettingsContext(profile=context.profile, settings=settings)
