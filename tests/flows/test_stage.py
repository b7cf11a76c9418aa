"""Stages as Prefect tasks: computed once, resumed, repaired, refreshed."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prefect import flow
from prefect.locking.protocol import LockManager
from pydantic import BaseModel, ConfigDict

from artifacts import Store
from tasks.locks import FileLockManager
from tasks.stage import Artifact, Recorder, Ref, StageOutput, StageRun, Where, stage

ROOT = Path(__file__).parents[2]

#: Names of the stages that computed, in order.
calls: list[str] = []


@pytest.fixture(autouse=True)
def _fresh(home: Path) -> None:
    calls.clear()


@stage("numbers", version=1)
def numbers(inputs: Any, settings: Any, where: Where) -> StageOutput:
    calls.append("numbers")
    assert inputs == {"text": "f" * 8}
    return StageOutput(tensors={"x": torch.full((3,), float(settings["value"]))}, info={"device": where.device})


class DoubledSettings(BaseModel):
    model_config = ConfigDict(extra="forbid")
    factor: int = 2


@stage("doubled", version=1)
def doubled(inputs: Any, settings: DoubledSettings, where: Where) -> StageOutput:
    """Streams its tensors, and fills in its info while it does."""
    calls.append("doubled")
    numbers = inputs["numbers"]
    assert isinstance(numbers, Artifact)
    info: dict[str, Any] = {}

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        yield "y", numbers.tensor("x") * settings.factor
        info["names"] = ["y"]

    return StageOutput(tensors=stream(), info=info, files={"note.txt": b"hello"})


@flow
def chain(
    value: int = 1,
    factor: int = 2,
    fingerprint: str = "f" * 8,
    device: str = "cpu",
    refresh: tuple[str, ...] = (),
) -> tuple[list[StageRun], Ref]:
    where = Where(device=device)
    with Recorder() as timings:
        first = numbers.run(
            inputs={"text": fingerprint},
            settings={"value": value},
            where=where,
            refresh="numbers" in refresh,
            label="a {label}",
            tags=["adapter-x"],
        )
        last = doubled.run(
            inputs={"numbers": first},
            settings=DoubledSettings(factor=factor),
            where=where,
            refresh="doubled" in refresh,
        )
    return timings.runs, last


def run(**parameters: Any) -> list[str]:
    """What a run of the flow computed."""
    calls.clear()
    runs, _ = chain(**parameters)
    assert [run.stage for run in runs] == ["numbers", "doubled"]
    assert [run.stage for run in runs if not run.cached] == calls
    return list(calls)


def test_the_result_and_its_record(home: Path) -> None:
    runs, ref = chain(value=4)
    artifact = Store().open(ref.key)
    assert artifact.tensor("y").tolist() == [8.0] * 3
    assert artifact.info == {"names": ["y"]}
    assert artifact.file("note.txt").read_bytes() == b"hello"
    manifest = artifact.manifest
    assert (manifest.stage, manifest.version, manifest.settings) == ("doubled", 1, {"factor": 2})
    assert manifest.inputs == {"numbers": runs[0].key}
    assert ref.key == doubled.key({"numbers": Ref(stage="numbers", key=runs[0].key)}, {})
    assert manifest.run["seconds"] >= 0
    assert manifest.run["max_rss_bytes"] > 1e6
    assert runs[1].computed == manifest.run
    assert runs[0].label == "a {label}"
    assert runs[0].to_dict()["cached"] is False
    assert sorted(path.name for path in (home / "results").iterdir()) == sorted(run.key for run in runs)
    assert str(home.parent) not in (home / "objects" / ref.key[:2] / ref.key / "manifest.json").read_text()


def test_a_second_run_is_cached() -> None:
    assert run() == ["numbers", "doubled"]
    assert run() == []


def test_the_task_runs_are_named_tagged_and_cached() -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

    for name in ("named-1", "named-2"):
        chain.with_options(flow_run_name=name)(value=77)
    with get_client(sync_client=True) as client:
        for _ in range(100):  # task runs reach the server as events, a moment later
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=["named-2"])))
            if len(runs) == 2 and all(run.state_name == "Cached" for run in runs):
                break
            time.sleep(0.1)
    assert {run.name: run.state_name for run in runs} == {"numbers a {label}": "Cached", "doubled": "Cached"}
    assert {tag for run in runs for tag in run.tags} == {"adapter-x"}


def test_settings_and_inputs_change_the_key_and_locations_do_not() -> None:
    assert run() == ["numbers", "doubled"]
    assert run(factor=3) == ["doubled"]
    assert run(value=2) == ["numbers", "doubled"]
    with pytest.raises(AssertionError):
        run(fingerprint="g" * 8)
    assert run(device="cuda:7") == []
    assert numbers.key({"text": "a"}, {}) != numbers.key({"text": "b"}, {})
    assert numbers.key({"text": "a"}, {}) != numbers.key({"other": "a"}, {})
    assert stage("numbers", version=2)(numbers.fn).key({}, {}) != numbers.key({}, {})


def test_a_store_that_moved_is_still_a_cache(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    home.rename(tmp_path / "elsewhere")
    monkeypatch.setenv("LORASUITE_HOME", str(tmp_path / "elsewhere"))
    assert run() == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["removed", "bytes", "manifest"])
def test_a_missing_or_damaged_artifact_is_computed_again_and_said_so(how: str, capture: Callable[[], str]) -> None:
    _, ref = chain()
    store = Store()
    before = store.open(ref.key).manifest.digest
    if how == "removed":
        store.remove(ref.key)
    elif how == "bytes":
        flip(store.path(ref.key) / "data.safetensors")
    else:
        (store.path(ref.key) / "manifest.json").unlink()
    assert run() == ["doubled"]
    assert "doubled: computing it again, for artifact" in capture()
    assert store.open(ref.key).manifest.digest == before
    assert run() == []


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What was logged as a warning: Prefect's loggers do not propagate to pytest's handler."""
    import tasks.stage

    messages: list[str] = []
    log = tasks.stage.run_log

    class Tee:
        def warning(self, message: str, *args: Any) -> None:
            messages.append(message % args)
            log().warning(message, *args)

    monkeypatch.setattr(tasks.stage, "run_log", Tee)
    return lambda: "\n".join(messages)


def test_lost_result_records_do_not_recompute(home: Path) -> None:
    run()
    shutil.rmtree(home / "results")
    assert run() == []
    for record in (home / "results").iterdir():
        record.write_text("{")
    assert run() == []


def test_refresh_computes_again_and_replaces() -> None:
    _, ref = chain()
    created = Store().open(ref.key).manifest.created
    assert run(refresh=("doubled",)) == ["doubled"]
    # the same bytes came out, so the object, and what others have open of it, stays
    assert Store().open(ref.key).manifest.created == created
    assert run() == []


def test_a_refresh_with_another_result_replaces_the_artifact() -> None:
    results = iter([1.0, 2.0, 3.0])

    @stage("drifting")
    def drifting(inputs: Any, settings: Any, where: Where) -> dict[str, Any]:
        return {"value": next(results)}

    @flow
    def drift(refresh: bool) -> Any:
        return Store().open(drifting.run(inputs={}, refresh=refresh).key).info["value"]

    assert [drift(False), drift(False), drift(True), drift(False)] == [1.0, 1.0, 2.0, 2.0]


def test_a_failed_stage_resumes_with_the_earlier_ones_cached() -> None:
    fail = True

    @stage("fragile")
    def fragile(inputs: Any, settings: Any, where: Where) -> dict[str, Any]:
        calls.append("fragile")
        if fail:
            raise RuntimeError("out of memory")
        return {"ok": True}

    @flow
    def resumed() -> Ref:
        first = numbers.run(inputs={"text": "f" * 8}, settings={"value": 1})
        return fragile.run(inputs={"numbers": first})

    with pytest.raises(RuntimeError, match="out of memory"):
        resumed()
    assert calls == ["numbers", "fragile"]
    fail = False
    ref = resumed()
    assert calls == ["numbers", "fragile", "fragile"]
    assert Store().open(ref.key).info == {"ok": True}


def test_retries_run_the_function_again() -> None:
    @stage("flaky", retry_delays=[0, 0])
    def flaky(inputs: Any, settings: Any, where: Where) -> dict[str, Any]:
        calls.append("flaky")
        if len(calls) < 3:
            raise OSError("try again")
        return {"calls": len(calls)}

    @flow
    def retried() -> Ref:
        return flaky.run(inputs={})

    assert Store().open(retried().key).info == {"calls": 3}


def test_errors_in_a_key_surface_before_anything_runs() -> None:
    @flow
    def wrong(settings: Any, inputs: Any) -> None:
        numbers.run(inputs=inputs, settings=settings)

    with pytest.raises(ValueError, match="nan"):
        wrong({"value": float("nan")}, {})
    with pytest.raises(TypeError, match="PosixPath"):
        wrong({"value": ROOT}, {})
    with pytest.raises(TypeError, match="needs a fingerprint"):
        wrong({}, {"text": 3})
    assert calls == []


def test_where_names_the_missing_path() -> None:
    with pytest.raises(KeyError, match="no path 'new' was given; there are old"):
        Where(paths={"old": Path("/x")}).path("new")


# -- several processes -------------------------------------------------------------------------------------------

RACER = """
import os, sys, time
from pathlib import Path
from prefect import flow
from artifacts import Store
from tasks.stage import Recorder, stage

log, mode = Path(sys.argv[1]), sys.argv[2]

@stage("slow")
def slow(inputs, settings, where):
    with log.open("a") as file:
        file.write(f"{os.getpid()}\\n")
    if mode == "hang":
        child = os.fork()  # a worker that inherits everything and outlives its parent
        if child == 0:
            time.sleep(120)
            os._exit(0)
        log.with_name("child").write_text(str(child))
        time.sleep(120)
    time.sleep(1)
    return {"pid": os.getpid()}

@flow
def race():
    with Recorder() as timings:
        ref = slow.run(inputs={"x": "1"})
    return timings.runs[0].cached, Store().open(ref.key).info["pid"]

print("ready", flush=True)
sys.stdin.readline()
print(*race(), flush=True)
"""


def racer(server: str, log: Path, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RACER, str(log), mode],
        cwd=ROOT,
        env={**os.environ, "PREFECT_API_URL": server, "PREFECT_HOME": str(log.parent / "prefect")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def go(process: subprocess.Popen[str], wait: bool = True) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    if wait:
        assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()


def test_two_processes_compute_a_stage_once(prefect_server: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    racers = [racer(prefect_server, log, "finish") for _ in range(2)]
    for process in racers:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in racers:
        go(process, wait=False)
    outputs = [process.communicate(timeout=90)[0].split() for process in racers]
    assert [process.returncode for process in racers] == [0, 0]
    pids = log.read_text().split()
    assert len(pids) == 1
    assert sorted(outputs) == [["False", pids[0]], ["True", pids[0]]]


def test_a_killed_holder_does_not_hold_up_the_others(prefect_server: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    holder = racer(prefect_server, log, "hang")
    other = racer(prefect_server, log, "finish")
    go(holder)
    deadline = time.monotonic() + 60
    while not log.with_name("child").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    go(other)
    time.sleep(1.5)
    assert other.poll() is None
    assert len(log.read_text().split()) == 1, "the other waits"
    child = int(log.with_name("child").read_text())
    try:
        holder.kill()
        holder.wait()
        assert other.communicate(timeout=60)[0].split() == ["False", str(other.pid)]
        os.kill(child, 0)  # raises if it is gone: the other did not wait for it
    finally:
        os.kill(child, signal.SIGKILL)
    assert len(log.read_text().split()) == 2


# -- the lock manager --------------------------------------------------------------------------------------------


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    locks = FileLockManager(tmp_path)
    assert isinstance(locks, LockManager)
    assert not locks.is_locked("k")
    assert locks.acquire_lock("k", "me")
    assert locks.acquire_lock("k", "me"), "the holder may ask again"
    assert locks.is_locked("k")
    assert locks.is_lock_holder("k", "me")
    assert not locks.is_lock_holder("k", "you")
    assert not locks.acquire_lock("k", "you", acquire_timeout=0)
    assert not locks.acquire_lock("k", "you", acquire_timeout=0.1)
    assert not locks.wait_for_lock("k", timeout=0.1)
    assert locks.acquire_lock("another/" + "k" * 300, "you"), "any key can be a file name"
    for copied in (copy.deepcopy(locks), pickle.loads(pickle.dumps(locks))):
        assert copied == locks
        assert copied.is_lock_holder("k", "me")
    with pytest.raises(ValueError, match="holds no lock"):
        locks.release_lock("k", "you")
    copy.deepcopy(locks).release_lock("k", "me")
    with pytest.raises(ValueError, match="holds no lock"):
        locks.release_lock("k", "me")
    assert locks.wait_for_lock("k")
    assert locks.acquire_lock("k", "you")
    locks.release_lock("k", "you")
    locks.release_lock("another/" + "k" * 300, "you")


def test_a_lock_can_expire(tmp_path: Path) -> None:
    locks = FileLockManager(tmp_path)
    assert locks.acquire_lock("k", "me", hold_timeout=0.05)
    assert locks.acquire_lock("k", "you", acquire_timeout=5)
    locks.release_lock("k", "you")


async def _async_use(locks: FileLockManager) -> None:
    assert await locks.aacquire_lock("k", "me")
    assert not await locks.aacquire_lock("k", "you", acquire_timeout=0.05)
    assert not await locks.await_for_lock("k", timeout=0.05)
    locks.release_lock("k", "me")
    assert await locks.await_for_lock("k")


def test_the_asynchronous_methods(tmp_path: Path) -> None:
    import asyncio

    asyncio.run(_async_use(FileLockManager(tmp_path)))


def test_a_forked_child_neither_holds_nor_frees_the_lock(tmp_path: Path) -> None:
    locks = FileLockManager(tmp_path)
    assert locks.acquire_lock("k", "me")
    child = os.fork()
    if child == 0:
        free = not locks.is_lock_holder("k", "me") and locks.is_locked("k")
        os._exit(0 if free else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert locks.is_locked("k")
    locks.release_lock("k", "me")
    assert not locks.is_locked("k")
