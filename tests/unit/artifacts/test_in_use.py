"""What is in use is not removed, what fails leaves the store as it was, and what is left behind is collected."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts import SideFile, Store, leases, stage_key
from tasks.locks import FileLockManager
from tests.faults import Faults, every_fault

ROOT = Path(__file__).parents[3]
KEY, OTHER = (stage_key(name, 1, {}, {}) for name in ("one", "other"))


def put(store: Store, key: str = KEY, value: float = 1, **given: Any) -> None:
    store.put(key, stage="s", version=1, settings={}, inputs={}, tensors={"x": torch.full((3,), value)}, **given)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """With two objects that nobody has used for a month; whoever made them is gone."""
    made = Store(tmp_path / "home")
    for key in (KEY, OTHER):
        put(made, key)
        made.open(key)
    leases.give_back()
    for key in (KEY, OTHER):
        old(made.path(key))
    return made


def old(path: Path, days: float = 31) -> None:
    when = time.time() - days * 86400
    for each in (*path.rglob("*"), path):
        os.utime(each, (when, when))


USER = """
import sys
from artifacts import Store
store = Store(sys.argv[1])
store.open(sys.argv[2])
print("open", flush=True)
sys.stdin.read()
"""


def test_what_a_living_process_opened_stays_whatever_is_asked(store: Store) -> None:
    command = [sys.executable, "-c", USER, str(store.home), KEY]
    user = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert user.stdout is not None and user.stdout.readline() == "open\n"
    old(store.path(KEY))  # as if it had been opened long ago
    assert [removal.key for removal in store.gc(keep_days=0).removals] == [OTHER]
    assert [removal.key for removal in store.gc(keep_days=0, dry_run=False).removals] == [OTHER]
    put(store, OTHER)
    leases.give_back()
    assert store.gc(keep_days=0, dry_run=False).removals == [], "younger than a process that goes on"
    user.kill()
    user.wait()
    assert {removal.key for removal in store.gc(keep_days=0, dry_run=False).removals} == {KEY, OTHER}
    assert not list((store.home / "leases").glob("*.lease"))


def test_a_forked_child_does_not_keep_what_its_parent_used(store: Store) -> None:
    script = f"import os, time; from artifacts import Store; Store({str(store.home)!r}).open({KEY!r})\n"
    script += "if os.fork() == 0: os.close(1); time.sleep(5); os._exit(0)\nprint('forked', flush=True); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "forked\n"
    assert {removal.key for removal in store.gc(keep_days=0).removals} == {KEY, OTHER}, "the child still runs"


def test_this_process_uses_what_it_opened_and_a_work_directory(store: Store) -> None:
    for name in ("mine", "left"):
        (store.home / "work" / name / "checkpoint-1").mkdir(parents=True)
        old(store.home / "work" / name)
    store.open(KEY)
    store.use("work/mine")
    old(store.path(KEY))
    removed = {removal.path.name for removal in store.gc(dry_run=False).removals}
    assert removed == {OTHER, "left"} and store.has(KEY)
    assert (store.home / "work" / "mine").exists() and not (store.home / "work" / "left").exists()


def test_what_is_left_beside_the_objects_is_collected(store: Store) -> None:
    home = store.home
    for name in ("results", "locks", "work/new"):
        (home / name).mkdir(parents=True)
    for name in (
        f"results/{KEY}",
        "results/no key",
        f"results/{OTHER}",
        "locks/a.lock",
        "locks/held.lock",
        "locks/new.lock",
    ):
        (home / name).write_text("x")
    (home / ".fingerprints.json.123.partial").write_text("x")
    for name in ("results", ".fingerprints.json.123.partial", "locks/a.lock", "locks/held.lock"):
        old(home / name)
    store.open(KEY)
    leases.give_back()
    with (home / "locks/held.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        listed = store.gc()
        assert sorted(path.name for path in (home / "locks").iterdir()) == ["a.lock", "held.lock", "new.lock"]
        assert store.gc(dry_run=False).removals == listed.removals and len(listed.removals) == 4
    assert sorted(path.name for path in (home / "locks").iterdir()) == ["held.lock", "new.lock"]
    assert [path.name for path in (home / "results").iterdir()] == [KEY] and (home / "work/new").exists()
    assert not list(home.glob(".*.partial"))


def test_a_lock_whose_file_was_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = FileLockManager(tmp_path / "locks")
    real = fcntl.flock

    def removed(descriptor: int, how: int) -> None:
        real(descriptor, how)
        monkeypatch.setattr(fcntl, "flock", real)
        next((tmp_path / "locks").iterdir()).unlink()

    monkeypatch.setattr(fcntl, "flock", removed)
    assert manager.acquire_lock("key", "me", acquire_timeout=5)
    assert manager.is_locked("key") and list((tmp_path / "locks").iterdir())
    manager.release_lock("key", "me")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_every_write_of_an_object_may_fail(code: int, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there is there, whole, and an object that is whole is never reported as failed."""
    key, new = stage_key("new", 1, {}, {}), Store(store.home)
    fsync, values = os.fsync, iter(range(2, 1000))

    def attempt() -> None:
        put(new, key)
        put(new, KEY, next(values), replace=True)

    put(store, KEY, 1)
    last = [1.0]

    def after(faults: Faults, raised: BaseException | None) -> None:
        found = Store(store.home).open(KEY).tensor("x")[0].item()
        if raised is None:
            assert found != last[0], "what was not said to have failed is there"
        else:
            assert found == last[0], f"{faults.failed}: the replaced object is back"
        last[0] = found
        store.verify(KEY)
        if store.has(key):
            store.verify(key)
            store.remove(key)
        assert os.fsync is fsync and not list((store.home / "tmp").iterdir())

    assert every_fault(store.home, attempt, after, code) > 15


def test_every_write_of_a_side_file_may_fail(tmp_path: Path) -> None:
    file = SideFile(tmp_path / "home" / "side.json", pytest.fail)
    file.update({"a": 1})
    numbers = iter(range(100))
    told = [1]

    def after(_faults: Faults, raised: BaseException | None) -> None:
        found = file.read()["a"]
        assert raised is None or found == told[0] or "fsync" in str(_faults.failed)
        told[0] = found
        assert not list(file.path.parent.glob(".*"))

    assert every_fault(file.path.parent, lambda: file.update({"a": next(numbers)}), after) >= 4


def test_a_store_on_a_read_only_disk_is_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(what: Any) -> None:
        raise OSError(errno.EROFS, "read-only", str(what))

    everything = Faults(store.home, 0)
    monkeypatch.setattr(everything, "_step", refuse)
    monkeypatch.setattr(Path, "touch", refuse)
    with everything.injected():
        assert store.open(KEY).tensor("x").tolist() == [1, 1, 1]
        put(store)  # it is there
        with pytest.raises(OSError, match="read-only"):
            put(store, stage_key("new", 1, {}, {}))
