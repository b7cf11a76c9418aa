"""A running ``lorasuite up``, shared by the tests that need workers, deployments and automations."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows import watchdog

ROOT = Path(__file__).parents[2]
#: Numbers no machine has, so that the runs stay on the CPU.
GPUS = ("61", "62")
MAIN = "from flows.command_line import main; main()"


def until(condition: Callable[[], Any], what: str, seconds: float = 150) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} took too long"
        time.sleep(0.2)
    return found


@dataclass
class Up:
    """A running ``lorasuite up``."""

    process: subprocess.Popen[str]
    told: dict[str, Any]
    home: Path
    log: Path

    @property
    def api(self) -> str:
        return str(self.told["api"])

    @property
    def auth(self) -> str:
        return Path(self.told["auth_file"]).read_text()

    @property
    def variables(self) -> dict[str, str]:
        return {"PREFECT_API_URL": self.api, "PREFECT_API_AUTH_STRING": self.auth}

    @property
    def fleets(self) -> Path:
        """The directory whose fleets are registered."""
        return self.home.parent / "fleets"

    def client(self) -> SyncPrefectClient:
        return get_client(sync_client=True)

    def runs(self, flow: str) -> list[Any]:
        with self.client() as client:
            named = FlowFilter(name=FlowFilterName(any_=[flow]))
            return sorted(client.read_flow_runs(flow_filter=named), key=lambda run: run.created)

    def finished(self, run_id: UUID, seconds: float = 240) -> Any:
        def look() -> Any:
            with self.client() as client:
                run = client.read_flow_run(run_id)
            return run if run.state is not None and run.state.is_final() else None

        try:
            return until(look, "a flow run", seconds)
        except AssertionError:
            raise AssertionError(self.log.read_text()[-6000:]) from None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("up")
    given = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    return given | {
        "LORASUITE_HOME": str(root / "home"),
        "PREFECT_HOME": str(root / "prefect"),
        "CUDA_VISIBLE_DEVICES": ",".join(GPUS),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


@pytest.fixture(scope="module")
def server_up(environment: dict[str, str]) -> Iterator[Up]:
    """Started once a file of tests: its workers ask for work every other second as long as it runs."""
    home = Path(environment["LORASUITE_HOME"])
    fleets = home.parent / "fleets"
    fleets.mkdir()
    log = home.parent / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from flows.command_line import main; main()",
                *f"up --json --port {free_port()} --fleet {fleets}".split(),
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
    watchdog.keep(process.pid)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, log.read_text()[-6000:]
    started = Up(process, json.loads(line), home, log)
    yield started
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) > len(started.told["workers"])
    process.terminate()
    assert process.wait(60) == 0, "stopped cleanly"
    watchdog.release(process.pid)
    _, left = psutil.wait_procs(below, timeout=5)
    assert not left
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{started.api}/health")


@pytest.fixture
def up(server_up: Up) -> Iterator[Up]:
    """The running ``lorasuite up``, and Prefect in this process talking to it for the time of the test."""
    EventsWorker.drain_all()  # what sends events keeps the server it first met
    with temporary_settings({PREFECT_API_URL: server_up.api, PREFECT_API_AUTH_STRING: server_up.auth}):
        yield server_up
        EventsWorker.drain_all()
