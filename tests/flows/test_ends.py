"""Servers that commands start, and how a run that was stopped leaves them."""

from __future__ import annotations

import os
import subprocess
from contextvars import Context
from typing import Any

import prefect.context
import psutil
import pytest
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_AUTH_STRING

from flows import temporary_server


def test_the_temporary_server_is_watched(prefect_server: str) -> None:
    """The one of these tests was started by Prefect, in our way: in its own session, and known to a watchdog."""
    server = SubprocessASGIServer._instances[None]
    assert SubprocessASGIServer._run_uvicorn_command is temporary_server.start
    process = server.server_process
    assert process is not None and os.getsid(process.pid) == process.pid
    beside = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    assert any("watchdog.py" in command for command in beside)


def test_the_temporary_server_answers_its_own_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it asks for is what clients of this process show, in whatever thread, and nothing that another knows."""
    monkeypatch.setattr(prefect.context, "GLOBAL_SETTINGS_CONTEXT", prefect.context.GLOBAL_SETTINGS_CONTEXT)
    started: list[dict[str, str]] = []

    def popen(command: list[str], env: dict[str, str], **_: Any) -> psutil.Process:
        started.append(env)
        return psutil.Process()

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(temporary_server.watchdog, "keep", lambda pid: None)
    for _ in range(2):
        Context().run(temporary_server.start, SubprocessASGIServer(port=1))
    first, second = (env["PREFECT_SERVER_API_AUTH_STRING"] for env in started)
    assert first == second == Context().run(PREFECT_API_AUTH_STRING.value) and len(first) > 40
    assert first not in os.environ.values()
