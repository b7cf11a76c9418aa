"""Prefect's temporary server: it answers this process alone, and ends with it, however this one ends."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections import deque
from typing import Any

import httpx
import prefect
import prefect.context
from prefect.context import SettingsContext
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_HOME,
    PREFECT_SERVER_API_AUTH_STRING,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    get_current_settings,
)

from flows import watchdog
from flows.cli_output import debugging
from lorasuite.errors import MachineError, Problem

#: The line of a traceback that names the error.
_ERROR = re.compile(r"[\w.]+(Error|Exception)\b")
#: Lines of a traceback that are not indented.
_TRACE = ("Traceback (", "The above exception was", "During handling of", "(Background on this error")


def watch() -> None:
    """Have Prefect start its temporary servers by :func:`start`."""
    SubprocessASGIServer._run_uvicorn_command = start  # type: ignore[method-assign, assignment]


def start(server: SubprocessASGIServer) -> subprocess.Popen[Any]:
    """Start the server as Prefect does (``SubprocessASGIServer._run_uvicorn_command``), watched, and wait for it.

    It has a session of its own: Ctrl-C ends the run first, which still has to say so to the server. It answers to a
    secret of this process: who else could reach it might tell the run that a task is done, and where its result lies.

    Raises:
        MachineError: where it ends at its start, with the last thing it said.
    """
    _lock()
    with contextlib.suppress(OSError):  # which the server will say better
        PREFECT_HOME.value().mkdir(parents=True, exist_ok=True)  # its database's directory: Prefect makes the last part
    while True:
        process = _started(int(server.port or 0))
        said = _answering(process, server.api_url)
        if said is None:
            return process
        if "address already in use" not in said:
            lines = [line for line in said.split("\n") if line[:1].strip()]
            named = [line for line in lines if _ERROR.match(line)]
            told = (named or lines or ["no reason is given"])[-1]
            what = f"Prefect's temporary server ended at its start ({' '.join(told.split())})"
            remedy = "Is there room on that disk, and may this user write there? Set PREFECT_HOME to another place."
            raise MachineError(Problem(str(PREFECT_HOME.value()), what, remedy))
        server.port = server.find_available_port()


def _started(port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(prefect.__module_path__.parent)]
    command += ["--factory", "prefect.server.api.server:create_app", "--host", "127.0.0.1", "--port", str(port)]
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
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    watchdog.keep(process.pid)
    return process


def _answering(process: subprocess.Popen[str], api: str) -> str | None:
    """Wait until the server answers, or for as long as Prefect would; what it said, where it has ended."""
    said: deque[str] = deque(maxlen=100)
    up = threading.Event()
    reader = threading.Thread(target=_relay, args=(process, said, up), name="temporary-server", daemon=True)
    reader.start()
    deadline = time.monotonic() + PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
    while time.monotonic() < deadline:
        if process.poll() is not None:
            reader.join(5)
            return "".join(said)
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{api}/health", timeout=5, trust_env=False).is_success:
                break
        time.sleep(0.1)
    up.set()
    return None


def _relay(process: subprocess.Popen[str], said: deque[str], up: threading.Event) -> None:
    """Read what the server says; pass on what it says of an error once it is up: not where that came from."""
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        if up.is_set() and (debugging() or not (line[:1].isspace() or line.startswith(_TRACE))):
            sys.stderr.write(line)


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
