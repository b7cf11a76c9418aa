"""What takes too long for every run of the tests: ``make soak``, with sizes by flags; prints tries and survivals.

Every write of the store, of side files and of a publication fails once; rows, configs, headers of weights and YAML of
any shape are read; a migration is killed in each of its stages; and many processes migrate the same adapters at once
into one home.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from artifacts import SideFile, Store, leases, stage_key
from lorasuite.reporting import assembled
from tests import models
from tests.faults import Faults, every_fault
from tests.flows.small import NAMES, Small

ROOT = Path(__file__).parents[1]
STAGES = (
    *("vocabulary", "transfer_matrices", "activations", "similarity", "layer_mapping", "head_mapping"),
    *("split", "transform", "finetune", "evaluate", "serving", "publish"),
)
LFT = {"finetune": {"batch_size": 4, "epochs": 1}, "evaluation": {"generate": False}, "controls": False}


def faults(folder: Path) -> Iterator[tuple[str, bool]]:
    """Each write that failed, and whether what was there before, or what was written, was there whole behind it."""
    for code in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS):
        name, seen = errno.errorcode[code], list[tuple[str, bool]]()
        home = folder / f"store-{name}"
        store, key, state = Store(home), stage_key("x", 1, {}, {}), [0.0]

        def put(value: float, store: Store = store, key: str = key) -> None:
            tensors = {"x": torch.full((1000,), value)}
            store.put(key, stage="x", version=1, settings={}, inputs={}, tensors=tensors, replace=True)

        def stored(
            _: Faults, raised: BaseException | None, home: Path = home, key: str = key, state: Any = state
        ) -> None:
            found = Store(home).open(key).tensor("x")[0].item()
            Store(home).verify(key)
            seen.append((f"store, {name}", (found == state[0]) is (raised is not None)))  # noqa: B023
            state[0] = found

        put(0.0)
        numbers = iter(range(1, 10_000))
        every_fault(home, lambda: put(next(numbers)), stored, code)  # noqa: B023
        file = SideFile(folder / f"side-{name}" / "side.json", print)
        file.update({"a": 0})

        def read(_: Faults, raised: BaseException | None, file: SideFile = file) -> None:
            seen.append((f"side file, {name}", isinstance(file.read().get("a"), int)))  # noqa: B023

        every_fault(file.path.parent, lambda: file.update({"a": next(numbers)}), read, code)  # noqa: B023
        outputs = folder / f"outputs-{name}"
        outputs.mkdir()

        def publish(outputs: Path = outputs) -> None:
            with assembled(outputs / "out") as scratch:
                for part in "abc":
                    with (scratch / part).open("w") as out:
                        out.write(part)

        def published(_: Faults, raised: BaseException | None, outputs: Path = outputs) -> None:
            left = {path.name for path in outputs.iterdir()}
            seen.append((f"publication, {name}", left == (set() if raised is not None else {"out"})))  # noqa: B023
            shutil.rmtree(outputs / "out", ignore_errors=True)

        every_fault(outputs, publish, published, code)
        yield from seen
    leases.give_back()


class Mother:
    """Starts migrations in processes of their own; see ``tests/flows/mother.py``."""

    def __init__(self, server: str, folder: Path) -> None:
        environment = {**os.environ, "PREFECT_API_URL": server, "PREFECT_HOME": str(folder / "prefect")}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "tests.flows.mother"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready\n"
        self.number = 0

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def start(self, home: Path, folder: Path, config: dict[str, Any], **trouble: Any) -> tuple[int, Path]:
        """The process's id, and the file that its record is written to."""
        self.number += 1
        out = folder / f"record-{self.number}.json"
        request = {"config": config, "out": str(out), "log": str(folder / "log"), "name": f"soak-{self.number}"}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({**request, "home": str(home), **trouble}) + "\n")
        self.process.stdin.flush()
        return int(self._line()), out


def alive(pid: int) -> bool:
    """Whether a process is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait(pids: list[int], most: int = 0, seconds: float = 600) -> None:
    """Wait until at most so many of the processes are left."""
    deadline = time.monotonic() + seconds
    while sum(map(alive, pids)) > most:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{pids} do not end")
        time.sleep(0.05)


def config(small: Small, name: str, output: Path) -> dict[str, Any]:
    """A migration with every stage."""
    data = {"train_data": str(small.root / "train.jsonl"), "eval_data": str(small.root / "test.jsonl")}
    return small.settings(name, output, **data, **LFT)


def kills(mother: Mother, small: Small, folder: Path) -> Iterator[tuple[str, bool]]:
    """Killed in each stage in turn; each run takes up what was stored, and the last one ends as an undisturbed one."""
    plain, home = folder / "plain", folder / "home"
    pid, out = mother.start(folder / "other-home", folder, config(small, "one", plain))
    wait([pid])
    for victim in STAGES:
        pid, out = mother.start(home, folder, config(small, "one", folder / "out"), kill=victim)
        wait([pid])
        whole = all(entry.problem is None for entry in Store(home).ls())
        yield "kill -9 in a stage", whole and not out.exists() and not (folder / "out").exists()
    pid, out = mother.start(home, folder, config(small, "one", folder / "out"))
    wait([pid])
    weights = [(path / "adapter_model.safetensors").read_bytes() for path in (plain, folder / "out")]
    yield "the run behind all kills", weights[0] == weights[1] and not list(folder.glob(".*.partial"))


def crowds(
    mother: Mother, pairs: list[Small], adapters: int, processes: int, folder: Path
) -> Iterator[tuple[str, bool]]:
    """So many processes migrate each adapter of each pair, all into one home, as many at once."""
    home, pids = folder / "home", list[int]()
    runs: list[tuple[str, Path]] = []
    for number in range(processes):
        for pair in pairs:
            for name in NAMES[:adapters]:
                output = folder / f"{pair.root.name}-{name}-{number}"
                wait(pids, processes - 1)
                pids.append(mother.start(home, folder, config(pair, name, output))[0])
                runs.append((f"{pair.root.name}-{name}", output))
    wait(pids)
    first: dict[str, bytes] = {}
    for job, output in runs:
        file = output / "adapter_model.safetensors"
        content = file.read_bytes() if file.exists() else b""
        yield "migrations at once", bool(content) and first.setdefault(job, content) == content
    computed = Counter(line.split()[1] for line in (folder / "log").read_text().splitlines())
    yield "each stage computed once", computed["similarity"] == len(pairs) and computed["transform"] == len(first)
    for entry in Store(home).ls():
        try:
            Store(home).verify(entry.key)
        except OSError:
            yield "artifacts whole behind them", False
        else:
            yield "artifacts whole behind them", True


def small_pairs(folder: Path, count: int) -> list[Small]:
    """Pairs of tiny bases with another new base each."""
    made = []
    for number in range(count):
        pair = Small.build(folder / f"pair{number}")
        shutil.rmtree(pair.new)
        models.build(pair.new, "llama", seed=10 + number, hidden=48, layers=4, heads=6, kv_heads=2)
        made.append(pair)
    return made


def fuzz(examples: int) -> Iterator[tuple[str, bool]]:
    """Each input of any shape, and whether it was read, or refused with an error of lorasuite's own, within 12 seconds.

    A kind of which one was not counts as lost from the first to the last.
    """
    file = ROOT / "tests" / "unit" / "test_fuzz.py"
    kinds = re.findall(r"^def (test_\w+)_of_any", file.read_text(encoding="utf-8"), flags=re.M)
    for kind in kinds:
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), "-k", kind],
            cwd=ROOT,
            env={**os.environ, "LORASUITE_FUZZ": str(examples)},
            stdout=sys.stderr,
            check=False,
        )
        what = f"fuzz, {kind.removeprefix('test_').replace('_', ' ')}"
        yield from [(what, ran.returncode == 0)] * examples


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """A Prefect server for all runs; its address."""
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    from flows import temporary_server

    temporary_server.watch()
    updates: dict[Any, Any] = {PREFECT_HOME: folder}
    with temporary_settings(updates), prefect_test_harness(server_startup_timeout=180):
        yield str(PREFECT_API_URL.value())


def main() -> None:
    """Run it all; end with 1 where something did not survive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=4, help=f"of a pair; at most {len(NAMES)}")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--fuzz", type=int, default=3000, help="inputs of any shape, of each kind")
    given = parser.parse_args()
    tries, survived, begun = Counter[str](), Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = small_pairs(folder, given.pairs)
        (folder / "faults").mkdir()

        def count(results: Iterator[tuple[str, bool]]) -> None:
            for what, good in results:
                tries[what] += 1
                survived[what] += good
            print(f"{time.monotonic() - begun:.0f} s", dict(survived), flush=True)

        count(faults(folder / "faults"))
        count(fuzz(given.fuzz))
        with server(folder / "prefect") as address:
            mother = Mother(address, folder)
            try:
                for part in ("kills", "crowds"):
                    (folder / part).mkdir()
                count(kills(mother, pairs[0], folder / "kills"))
                count(crowds(mother, pairs, given.adapters, given.processes, folder / "crowds"))
            finally:
                mother.process.kill()
    for what in tries:
        print(f"{what:30} {tries[what]:5} tries {survived[what]:5} survived")
    sys.exit(tries != survived)


if __name__ == "__main__":
    main()
