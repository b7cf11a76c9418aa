"""Migrations in processes of their own against one server: side by side, killed, and retried."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterName

from artifacts import Store
from tests.flows.small import Small
from tests.s3 import bucket

ROOT = Path(__file__).parents[2]
ENTRYPOINT = "flows/migrate_adapter.py:migrate_adapter"
PAIR = ["vocabulary", "transfer_matrices", "activations", "similarity", "layer_mapping", "head_mapping"]
#: Stages of one adapter, in the order in which they are computed.
OWN = ("split", "transform", "rehearsal", "finetune", "evaluate", "serving")
LFT = {"finetune": {"batch_size": 4, "epochs": 1}, "evaluation": {"generate": False}, "controls": False}


@dataclass
class Child:
    """One migration in its own process."""

    pid: int
    out: Path
    log: Path
    name: str

    def alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = 150) -> None:
        until(lambda: not self.alive(), seconds)

    def record(self) -> dict[str, Any]:
        self.wait()
        assert self.out.is_file(), "the migration failed"
        found: dict[str, Any] = json.loads(self.out.read_text())
        return found

    def computed(self) -> list[str]:
        """Names of the stages this process computed, in order."""
        lines = [line.split() for line in self.log.read_text().splitlines()] if self.log.is_file() else []
        return [stage for pid, stage in lines if int(pid) == self.pid]


def until(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "that took too long"
        time.sleep(0.05)


@dataclass
class Mother:
    """Starts migrations; see ``mother.py``."""

    process: subprocess.Popen[str]
    children: list[Child] = field(default_factory=list)

    def start(self, home: Path, folder: Path, config: dict[str, Any], **trouble: Any) -> Child:
        assert self.process.stdin is not None and self.process.stdout is not None
        number = len(self.children)
        folder.mkdir(parents=True, exist_ok=True)
        out, log, name = folder / f"record-{number}.json", folder / "log", f"child-{number}-{folder.name}"
        request = {"config": config, "out": str(out), "log": str(log), "name": name, "home": str(home), **trouble}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        child = Child(int(self.process.stdout.readline()), out, log, name)
        self.children.append(child)
        return child


@pytest.fixture(scope="module")
def mother(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mother]:
    environment = {
        **os.environ,
        "PREFECT_API_URL": prefect_server,
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect-of-children")),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.flows.mother"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    made = Mother(process)
    yield made
    for child in made.children:
        if child.alive():
            child.kill()
    process.kill()
    process.wait()


def contents(home: Path) -> dict[str, str]:
    """Key of every artifact → digest of its tensors, and everything else that must be reproducible."""
    entries = [entry.manifest for entry in Store(home).ls() if entry.manifest]
    assert entries
    return {entry.key: entry.digest for entry in entries}


@pytest.fixture(scope="module")
def undisturbed(mother: Mother, small: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Home and output of a migration that nothing happened to."""
    root = tmp_path_factory.mktemp("undisturbed")
    child = mother.start(root / "home", root, config(small, root / "out"))
    record = child.record()
    assert {row["stage"] for row in record["timings"]} == {*PAIR, *OWN}
    return root / "home", root / "out"


def config(small: Small, output: Path, name: str = "one") -> dict[str, Any]:
    data = {"train_data": str(small.root / "train.jsonl"), "eval_data": str(small.root / "test.jsonl")}
    return small.settings(name, output, **data, **LFT)


def test_two_adapters_at_once_compute_the_pair_once(
    mother: Mother, small: Small, undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    children = [mother.start(home, tmp_path, config(small, tmp_path / name, name), slow=0.2) for name in ("one", "two")]
    first, second = (
        {(row["stage"], row["label"]): row["cached"] for row in child.record()["timings"]} for child in children
    )
    shared = [stage for stage in first if stage[0] in PAIR]
    assert len(shared) == len(PAIR) + 1  # activations of both bases
    for stage in shared:
        assert sorted([first[stage], second[stage]]) == [False, True], f"{stage} was computed once"
    together = Counter(stage for child in children for stage in child.computed())
    assert together["activations"] == 2 and together["similarity"] == together["head_mapping"] == 1
    digests = contents(undisturbed[0])
    assert {key: digest for key, digest in contents(home).items() if key in digests} == digests


def test_a_killed_holder_is_taken_over(
    mother: Mother, small: Small, undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    holder = mother.start(home, tmp_path, config(small, tmp_path / "a"), hang="activations")
    until(lambda: "activations" in holder.computed())
    other = mother.start(home, tmp_path, config(small, tmp_path / "b"))
    time.sleep(2)
    assert other.alive() and other.computed() == [], "it waits for the holder"
    holder.kill()
    record = other.record()
    assert other.computed()[:2] == ["activations", "activations"]
    assert [row["cached"] for row in record["timings"]][:2] == [True, True], "what the holder had stored"
    assert contents(home) == contents(undisturbed[0])
    assert same_bytes(tmp_path / "b", undisturbed[1])


def same_bytes(one: Path, other: Path) -> bool:
    return (one / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()


def test_killed_in_each_stage_in_turn(
    mother: Mother, small: Small, undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    """Every process takes up what the one before was killed in, and is itself killed in the next stage."""
    home, settings = tmp_path / "home", config(small, tmp_path / "out")
    before: str | None = None
    for victim in [*PAIR, *OWN, "publish"]:
        child = mother.start(home, tmp_path, settings, kill=victim)
        child.wait()
        assert not child.out.exists() and not (tmp_path / "out").exists()
        computed = list(dict.fromkeys(child.computed()))
        expected = [stage for stage in (before, victim) if stage not in (None, "publish")]
        assert computed == expected, "earlier stages were cached"
        before = victim
    last = mother.start(home, tmp_path, settings)
    assert all(row["cached"] for row in last.record()["timings"]) and last.computed() == []
    assert contents(home) == contents(undisturbed[0])
    assert same_bytes(tmp_path / "out", undisturbed[1])


def test_hosts_share_a_pair_over_s3(
    mother: Mother, small: Small, undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    """Two homes that share nothing but a bucket, at once; then a third one that has yet to download everything."""
    with bucket() as address:
        env = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        env["LORASUITE_STORE"] = f"{address}/store"
        hosts = [
            mother.start(tmp_path / f"{name}-home", tmp_path, config(small, tmp_path / name, name), slow=0.2, env=env)
            for name in ("one", "two")
        ]
        for child in hosts:
            child.record()
        together = Counter(stage for child in hosts for stage in child.computed())
        assert {stage: together[stage] for stage in PAIR} == dict.fromkeys(PAIR, 1) | {"activations": 2}
        third = mother.start(tmp_path / "third", tmp_path, config(small, tmp_path / "again"), env=env)
        assert all(row["cached"] for row in third.record()["timings"]) and third.computed() == []
    assert contents(tmp_path / "third") == contents(undisturbed[0])
    assert same_bytes(tmp_path / "again", undisturbed[1])


def test_retry_of_the_same_flow_run(mother: Mother, small: Small, prefect_server: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    child = mother.start(home, tmp_path, config(small, tmp_path / "out"), fail="transform")
    child.wait()
    assert child.computed()[-1] == "transform" and child.computed().count("transform") == 1, "no retry of a bug"
    with get_client(sync_client=True) as client:
        named = FlowRunFilter(name=FlowRunFilterName(any_=[child.name]))
        (run,) = client.read_flow_runs(flow_run_filter=named)
        assert run.state_name == "Failed" and "a failure on purpose" in run.state.message
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "flow-run", "retry", str(run.id), "--entrypoint", ENTRYPOINT],
            cwd=ROOT,
            env={**os.environ, "PREFECT_API_URL": prefect_server, "LORASUITE_HOME": str(home)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        again = client.read_flow_run(run.id)
        assert again.state_name == "Completed" and again.run_count == 2

        def states() -> dict[str, list[str]]:
            found: dict[str, list[str]] = {}
            by_id = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
            for task in client.read_task_runs(flow_run_filter=by_id):
                found.setdefault(task.name, []).append(task.state_name or "")
            return found

        until(lambda: "Completed" in states().get("evaluate migrated+lft", []))  # task runs arrive as events
        assert all("Cached" in states()[stage] for stage in PAIR if stage != "activations")
        assert "Completed" in states()["transform"]
    assert (tmp_path / "out" / "migration.json").is_file()
