"""``lorasuite up`` as a user starts it: workers pinned to GPUs, events, crashes and retries, the manual's commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import psutil
import pytest
from PIL import Image
from prefect import flow as prefect_flow
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.deployments import run_deployment
from websockets import ConnectionClosed, InvalidStatus, Subprotocol
from websockets.sync.client import connect

from flows.host import POOL, Host, plan_workers, set_up, visible_gpus
from flows.prepare_pair import prepare_pair
from flows.server import HOSTS
from flows.watch_base_models import EVENT, complete, watch_base_models
from tests.browser import needs_chromium, page
from tests.flows.small import Small
from tests.flows.upped import GPUS, ROOT, Up, until

BLOCKS = re.findall(r"^```bash([^\n]*)\n(.*?)^```", (ROOT / "docs" / "operations.md").read_text(), flags=re.M | re.S)


def test_what_up_starts(up: Up) -> None:
    assert up.told["workers"] == ["worker gpu-61", "worker gpu-62", "worker control"]
    with up.client() as client:
        queues = {queue.name: queue.concurrency_limit for queue in client.read_work_queues(work_pool_name=POOL)}
        names = {d.name: d for d in client.read_deployments()}
    assert queues == {"default": None, "gpu-61": 1, "gpu-62": 1, "any-gpu": None, "control": None}
    assert set(names) == {"migrate-adapter", "prepare-pair", "migrate-fleet", "watch-base-models"}
    assert {name for name, d in names.items() if d.schedules} == {"migrate-fleet", "watch-base-models"}
    assert not any(schedule.active for d in names.values() for schedule in d.schedules)
    assert names["migrate-fleet"].concurrency_options.collision_strategy.value == "ENQUEUE"


def test_nobody_else_reaches_the_api(up: Up) -> None:
    """No request without what is kept for the owner alone, whatever it calls itself; pages of other origins neither."""
    secret = Path(up.told["auth_file"])
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600 and len(secret.read_text()) > 40
    event = {"event": "lorasuite.base-model.released", "resource": {"prefect.resource.id": "x"}, "id": str(uuid4()),
             "occurred": "2026-01-01T00:00:00Z", "payload": {"fleet": "/etc/passwd"}}  # fmt: skip
    owner: Any = tuple(up.auth.split(":", 1))
    strangers: list[tuple[int, dict[str, str], Any]] = [
        (401, {}, None),
        (401, {"Authorization": "Basic bG9yYXN1aXRlOng="}, None),
        (400, {"Host": "evil.example"}, None),
        (400, {"Host": f"localhost.evil.example:{up.api.split(':')[2]}"}, owner),
    ]
    for status, headers, auth in strangers:
        for path, body in (("events", [event]), ("flow_runs/filter", {})):
            asked = httpx.post(f"{up.api}/{path}", json=body, headers=headers, auth=auth)
            assert asked.status_code == status, (path, headers)
    assert httpx.get(up.told["dashboard"], headers={"Host": "evil.example"}).status_code == 400
    address = up.api.replace("http", "ws") + "/events/in"
    for protocol in (None, [Subprotocol("prefect")]):
        with pytest.raises((InvalidStatus, ConnectionClosed)), connect(address, subprotocols=protocol) as socket:
            socket.send(json.dumps({"type": "auth", "token": "lorasuite:x"}))
            socket.send(json.dumps(event))
            while True:
                socket.recv(timeout=20)
    asked = httpx.post(
        f"{up.api}/flow_runs/filter",
        json={},
        auth=owner,
        headers={"Origin": "http://evil.example"},
    )
    assert asked.status_code == 200 and "access-control-allow-origin" not in asked.headers
    assert secret.read_text() not in up.log.read_text()
    below = psutil.Process(up.process.pid).children(recursive=True)
    assert not any(up.auth in word for process in below for word in process.cmdline()), "which every user can read"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_does_not_get_the_secret(up: Up) -> None:
    files = [up.told["auth_file"], *(f"/proc/{p.pid}/environ" for p in psutil.Process(up.process.pid).children())]
    look = "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); "
    look += "print([os.access(file, os.R_OK) for file in sys.argv[1:]])"
    seen = subprocess.run([sys.executable, "-I", "-c", look, *files], capture_output=True, text=True, check=True).stdout
    assert json.loads(seen.lower()) == [False] * len(files) and len(files) > 3


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

    set_up(up.api, plan_workers(GPUS), crash_after=10)
    try:
        (tmp_path / "wait-hangs").touch()
        hanging = start_probe(up, tmp_path, "gpu-62", "hangs")
        # kill -9 of the run and of its worker, which could otherwise still report it; the run may be too young to have
        # sent a heartbeat
        pid_file = tmp_path / "wait-hangs.pid"
        run_pid, worker_pid = map(int, until(lambda: pid_file.is_file() and pid_file.read_text(), "the run").split())
        os.kill(worker_pid, signal.SIGKILL)
        os.kill(run_pid, signal.SIGKILL)
        waiting = start_probe(up, tmp_path, "gpu-62", "waits")
        assert up.finished(hanging).state.name == "Crashed"
    finally:
        set_up(up.api, plan_workers(GPUS))
    with up.client() as client:
        state = client.read_flow_run(waiting).state
        assert state is not None and state.type.value == "SCHEDULED", "nobody else takes it"

    (tmp_path / "wait-hangs").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "flow-run", "retry", str(hanging)],
        env={**environment, **up.variables},
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


def test_an_event_over_http_starts_the_fleet(up: Up, tmp_path: Path) -> None:
    """A worker has the run; it reads none but registered fleets, and quotes nothing of another file."""
    (tmp_path / "private.yaml").write_text("password: [hunter2\n")
    payload = {"new_base": "/models/new", "fleet": str(tmp_path / "private.yaml"), "old_base": ""}
    event = {"event": EVENT, "resource": {"prefect.resource.id": "lorasuite.base-model.x"}, "payload": payload}
    command = [
        "curl",
        "-sS",
        "--fail",
        "-X",
        "POST",
        "-u",
        up.auth,
        f"{up.api}/events",
        "-H",
        "content-type: application/json",
    ]
    event |= {"id": "5d0f1c1e-8f1b-4b55-9a53-0d5ff2b1a001", "occurred": "2026-01-01T00:00:00Z"}
    subprocess.run([*command, "-d", json.dumps([event])], check=True)
    run = until(lambda: up.runs("migrate-fleet"), "the trigger")[-1]
    assert run.parameters == payload | {"workers": True} and run.deployment_id is not None
    ended = up.finished(run.id)
    assert ended.state.name == "Failed" and "is not the name of a registered fleet" in ended.state.message
    assert "hunter2" not in ended.state.message + up.log.read_text()


def test_the_watcher_starts_the_fleet_for_a_new_checkpoint(
    up: Up, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORASUITE_HOME", str(tmp_path / "home"))
    bases = tmp_path / "bases"
    shutil.copytree(small.new, bases / "known")
    small.fleet(up.fleets / "watched.yaml", ("two",)).chmod(0o600)

    def look() -> dict[str, Any]:
        found: dict[str, Any] = watch_base_models([str(bases)], fleet="watched", settle_seconds=0)
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
    assert run.parameters["new_base"] == str(bases / "half") and run.parameters["fleet"] == "watched"
    assert up.finished(run.id).state.name == "Completed", up.log.read_text()[-6000:]
    assert (up.fleets / "migrated" / "half" / "two" / "report.html").is_file()
    assert [r.work_queue_name for r in up.runs("migrate-adapter")] == ["any-gpu"], "spread over the workers"


@needs_chromium
def test_the_dashboard_shows_cached_stages_and_the_heat_map(up: Up, small: Small, home: Path, tmp_path: Path) -> None:
    for _ in range(2):
        prepare_pair(str(small.old), str(small.new), str(small.root / "texts.jsonl"))
    run = up.runs("prepare-pair")[-1]
    with up.client() as client:
        of_run = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
        (shown,) = [a for a in client.read_artifacts(flow_run_filter=of_run) if (a.key or "").startswith("pair-")]
    dashboard = str(up.told["dashboard"])
    with page(1400, 1600) as seen:
        seen.page.set_default_timeout(60_000)
        seen.page.add_init_script(
            f"localStorage.setItem('prefect-password', btoa({json.dumps(up.auth)}))"
        )  # as asked for
        seen.page.goto(f"{dashboard}/runs/flow-run/{run.id}")
        seen.page.get_by_role("tab", name="Task Runs").or_(seen.page.get_by_text("Task Runs", exact=True)).first.click()
        for text in ("small-old→small-new", "head_mapping", "Cached"):
            seen.page.get_by_text(text).first.wait_for()
        seen.page.goto(f"{dashboard}/artifacts/artifact/{shown.id}")
        picture = seen.page.locator("img[src^='data:image/png;base64']").first
        picture.wait_for()
        picture.screenshot(path=tmp_path / "heat-map.png")
    with Image.open(tmp_path / "heat-map.png") as image:
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(1 << 24)}
    # the plot's white paper, and the dark end of its colour scale (CKA 0: the models are random)
    assert colours.get((255, 255, 255), 0) > 10_000
    assert sum(n for (r, g, b), n in colours.items() if abs(r - 68) < 8 and g < 16 and abs(b - 84) < 8) > 1_000


def test_every_block_says_who_runs_it() -> None:
    assert len(BLOCKS) > 5
    for flag, text in BLOCKS:
        if flag.strip() == "run":
            continue
        first = text.splitlines()[0]
        assert first.startswith(("# run by tests/", "# not run by a test")), first
        for named in re.findall(r"tests/\w+/\w+\.py", first):
            assert (ROOT / named).is_file()


def test_the_commands(up: Up, environment: dict[str, str], small: Small, tmp_path: Path) -> None:
    for name in ("deploy", "flows"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "models").symlink_to(small.root / "bases")
    small.fleet(tmp_path / "fleet.yaml", ("one",))
    programs = {"prefect": "-m prefect", "lorasuite": "-c 'from flows.command_line import main; main()'"}
    (tmp_path / "bin").mkdir()
    for name, arguments in programs.items():
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    script = "".join(text for flag, text in BLOCKS if flag.strip() == "run")
    done = subprocess.run(
        ["bash", "-euxc", script],
        cwd=tmp_path,
        env={**environment, **up.variables, "PATH": f"{tmp_path / 'bin'}:{environment['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    if done.returncode != 0:
        pytest.fail(done.stdout[-3000:] + done.stderr[-3000:])
    assert "gpu-61" in done.stdout


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
        env={**environment, **up.variables, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with up.client() as client:
        paths = {d.path or json.dumps(d.pull_steps) for d in client.read_deployments() if "lorasuite" in d.tags}
    assert len(paths) == 1 and str(tmp_path) in paths.pop()


@pytest.mark.parametrize(
    ("host", "api", "name"),
    [
        ("127.0.0.1", "http://127.0.0.1:4200/api", "127.0.0.1"),
        ("0.0.0.0", "http://127.0.0.1:4200/api", "0.0.0.0"),
        ("::1", "http://[::1]:4200/api", "[::1]"),
        ("::", "http://[::1]:4200/api", "[::]"),
        ("host.example", "http://host.example:4200/api", "host.example"),
    ],
)
def test_addresses_of_either_kind(host: str, api: str, name: str) -> None:
    started = Host(host, root=ROOT, auth="a:b", names=("2001:db8::1",))
    allowed = started.environment()[HOSTS].split(",")
    assert started.api == api and {name, "127.0.0.1", "[::1]", "localhost", "[2001:db8::1]"} == set(allowed)
    assert api.split("/")[2].removesuffix(":4200") in allowed


def test_gpus_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, 3,GPU-1a")
    assert visible_gpus() == ["0", "3", "GPU-1a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_gpus() == []
    assert [(plan.name, plan.devices) for plan in plan_workers([])] == [("cpu", None), ("control", None)]
