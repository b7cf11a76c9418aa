"""``lorasuite up`` as a user starts it: workers pinned to GPUs, events, the watcher, crashes and retries."""

from __future__ import annotations

import json
import os
import shutil
import signal
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
import pytest
from prefect import flow as prefect_flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.deployments import run_deployment
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.host import POOL, Host, plan_workers, set_up, visible_gpus
from flows.watch_base_models import EVENT, complete, watch_base_models
from tests.flows.small import Small

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
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


@pytest.fixture(scope="module")
def up(environment: dict[str, str]) -> Iterator[Up]:
    home = Path(environment["LORASUITE_HOME"])
    log = home.parent / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from flows.command_line import main; main()",
                *f"up --json --port {free_port()}".split(),
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, log.read_text()[-6000:]
    started = Up(process, json.loads(line), home, log)
    with temporary_settings({PREFECT_API_URL: started.api}):
        yield started
    process.terminate()
    assert process.wait(60) == 0, "stopped cleanly"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{started.api}/health")
    left = subprocess.run(["pgrep", "-f", f"PREFECT_API_URL={started.api}"], capture_output=True, check=False)
    assert not left.stdout


def test_what_up_starts(up: Up) -> None:
    assert up.told["workers"] == ["worker gpu-61", "worker gpu-62", "worker control"]
    with up.client() as client:
        queues = {queue.name: queue.concurrency_limit for queue in client.read_work_queues(work_pool_name=POOL)}
        names = {d.name: d for d in client.read_deployments()}
    assert queues == {"default": None, "gpu-61": 1, "gpu-62": 1, "any-gpu": 2, "control": 4}
    assert set(names) == {"migrate-adapter", "prepare-pair", "migrate-fleet", "watch-base-models"}
    assert {name for name, d in names.items() if d.schedules} == {"migrate-fleet", "watch-base-models"}
    assert not any(schedule.active for d in names.values() for schedule in d.schedules)
    assert names["migrate-fleet"].concurrency_options.collision_strategy.value == "ENQUEUE"


def start_probe(up: Up, folder: Path, queue: str, name: str) -> UUID:
    source: Any = prefect_flow.from_source(source=str(ROOT), entrypoint="tests/flows/probe.py:probe")
    source.deploy(name=queue, work_pool_name=POOL, work_queue_name=queue, print_next_steps=False)
    run: Any = run_deployment(f"probe/{queue}", parameters={"name": name, "folder": str(folder)}, timeout=0)
    return UUID(str(run.id))


def test_a_worker_pins_its_gpu_and_a_dead_ones_run_waits_and_is_retried(
    up: Up, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORASUITE_HOME", str(up.home))  # for the worker that this test starts itself
    pinned = start_probe(up, tmp_path, "gpu-61", "pinned")
    assert up.finished(pinned).state.name == "Completed"
    assert (tmp_path / "pinned").read_text() == f"61 {up.home}"

    set_up(up.api, plan_workers(GPUS), crash_after=10)  # before the run's only heartbeat
    (tmp_path / "wait-hangs").touch()
    hanging = start_probe(up, tmp_path, "gpu-62", "hangs")
    # kill -9 of the run and of its worker, which could otherwise still report it
    pid_file = tmp_path / "wait-hangs.pid"
    run_pid, worker_pid = map(int, until(lambda: pid_file.is_file() and pid_file.read_text(), "the run").split())
    os.kill(worker_pid, signal.SIGKILL)
    os.kill(run_pid, signal.SIGKILL)
    waiting = start_probe(up, tmp_path, "gpu-62", "waits")
    assert up.finished(hanging).state.name == "Crashed"
    set_up(up.api, plan_workers(GPUS))
    with up.client() as client:
        state = client.read_flow_run(waiting).state
        assert state is not None and state.type.value == "SCHEDULED", "nobody else takes it"

    (tmp_path / "wait-hangs").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "flow-run", "retry", str(hanging)],
        env={**environment, "PREFECT_API_URL": up.api},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    port = int(up.api.split(":")[2].split("/")[0])
    again = Host(port=port, root=ROOT)
    try:
        again.start_worker(plan_workers(GPUS)[1])
        states = [up.finished(run).state for run in (hanging, waiting)]
        assert [state.name for state in states] == ["Completed", "Completed"], states
    finally:
        again.stop()
    assert (tmp_path / "hangs").read_text() == f"62 {up.home}"


def test_an_event_over_http_starts_the_fleet(up: Up, small: Small, tmp_path: Path) -> None:
    file = small.fleet(tmp_path / "fleet.yaml", ("one",))
    payload = {"new_base": str(small.new), "fleet": str(file), "old_base": ""}
    event = {"event": EVENT, "resource": {"prefect.resource.id": "lorasuite.base-model.x"}, "payload": payload}
    command = ["curl", "-sS", "--fail", "-X", "POST", f"{up.api}/events", "-H", "content-type: application/json"]
    event |= {"id": "5d0f1c1e-8f1b-4b55-9a53-0d5ff2b1a001", "occurred": "2026-01-01T00:00:00Z"}
    subprocess.run([*command, "-d", json.dumps([event])], check=True)
    run = until(lambda: up.runs("migrate-fleet"), "the trigger")[-1]
    assert run.parameters["fleet"] == str(file) and run.parameters["new_base"] == str(small.new)
    assert run.deployment_id is not None
    state = up.finished(run.id).state
    assert state.name == "Completed", up.log.read_text()[-6000:]
    assert (tmp_path / "migrated" / "small-new" / "one" / "migration.json").is_file()
    assert [r.work_queue_name for r in up.runs("migrate-adapter")] == ["any-gpu"], "spread over the workers"


def test_the_watcher_starts_the_fleet_for_a_new_checkpoint(
    up: Up, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORASUITE_HOME", str(tmp_path / "home"))
    bases = tmp_path / "bases"
    shutil.copytree(small.new, bases / "known")
    file = small.fleet(tmp_path / "fleet.yaml", ("two",))

    def look() -> dict[str, Any]:
        found: dict[str, Any] = watch_base_models([str(bases)], fleet=str(file), settle_seconds=0)
        return found

    assert look() == {"announced": [], "unfinished": []}, "the first look only remembers"
    shutil.copytree(small.new, bases / "half")
    weights = bases / "half" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert look() == {"announced": [], "unfinished": [str(bases / "half")]}
    before = len(up.runs("migrate-fleet"))
    weights.write_bytes(whole)
    assert look() == {"announced": [str(bases / "half")], "unfinished": []}
    assert look() == {"announced": [], "unfinished": []}, "once"
    run = until(lambda: up.runs("migrate-fleet")[before:], "the trigger")[0]
    assert run.parameters["new_base"] == str(bases / "half") and run.parameters["fleet"] == str(file)
    assert up.finished(run.id).state.name == "Completed"
    assert (tmp_path / "migrated" / "half" / "two" / "report.html").is_file()


def test_half_written_checkpoints(small: Small, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(small.new, tmp_path / name, copy_function=shutil.copyfile))

    assert complete(copy("whole"))
    assert not complete(tmp_path / "whole", settle_seconds=3600), "written a moment ago"
    (copy("loading") / "model.safetensors.incomplete").touch()
    (copy("unweighted") / "model.safetensors").unlink()
    (copy("unconfigured") / "config.json").unlink()
    (copy("torn") / "config.json").write_text('{"model_type": "lla')
    for name in ("loading", "unweighted", "unconfigured", "torn"):
        assert not complete(tmp_path / name), name


def test_deploy_from_a_plain_checkout(up: Up, environment: dict[str, str], tmp_path: Path) -> None:
    for name in ("flows", "tasks", "artifacts", "lorasuite"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("models", "__pycache__"))
    shutil.copyfile(ROOT / "prefect.yaml", tmp_path / "prefect.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=tmp_path,
        env={**environment, "PREFECT_API_URL": up.api, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with up.client() as client:
        paths = {d.path or json.dumps(d.pull_steps) for d in client.read_deployments() if "lorasuite" in d.tags}
    assert len(paths) == 1 and str(tmp_path) in paths.pop()


def test_gpus_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, 3,GPU-1a")
    assert visible_gpus() == ["0", "3", "GPU-1a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_gpus() == []
    assert [(plan.name, plan.devices) for plan in plan_workers([])] == [("cpu", None), ("control", None)]
