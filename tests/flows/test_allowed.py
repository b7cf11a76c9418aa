"""What an operator allows the runs of workers: fleets by name, code of models, directories of task files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from flows.allowed import CODE, FLEETS, TASK_FILES, Allowed
from flows.migrate_adapter import migrate_adapter
from flows.migrate_fleet import migrate_fleet
from flows.prepare_pair import prepare_pair
from lorasuite.errors import ConfigError
from lorasuite.planning import MigrationConfig
from tests.flows.small import Small


@pytest.fixture
def on_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a run of a deployment whose worker was allowed nothing."""
    for name in ("flows.migrate_adapter", "flows.migrate_fleet", "flows.prepare_pair"):
        monkeypatch.setattr(f"{name}.deployed", lambda: True)
    for name in (FLEETS, CODE, TASK_FILES):
        monkeypatch.delenv(name, raising=False)


def fleets(folder: Path, *names: str) -> list[Path]:
    files = [folder / name for name in names]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("pairs: []\n")
        file.chmod(0o600)
    return files


def test_fleets_go_by_registered_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = fleets(tmp_path, "a/one.yaml", "b/two.yml")
    (tmp_path / "b" / "note.txt").touch()
    monkeypatch.chdir(tmp_path)
    said = Allowed(("a/one.yaml", "b")).environment()
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir("/")
    here = Allowed.here()
    assert here.registered() == {"one": one, "two": two}
    (three,) = fleets(tmp_path, "b/three.yaml")
    assert here.fleet("three") == three, "put there while the worker runs"
    for name in (str(one), "../a/one", "one.yaml", "note", "", None, {"pairs": []}, "x" * 1000, "o\0ne"):
        with pytest.raises(ConfigError, match="is not the name of a registered fleet") as refused:
            here.fleet(name)
        assert len(str(refused.value)) < 300
    (tmp_path / "c").mkdir()
    two.rename(tmp_path / "c" / "one.yaml")
    with pytest.raises(ConfigError, match="has the name 'one'"):
        Allowed((str(one), str(tmp_path / "c"))).environment()
    with pytest.raises(ConfigError) as missing:
        Allowed((str(tmp_path / "none.yaml"),), (), (str(one),)).environment()
    assert len(missing.value.problems) == 2


def test_a_fleet_that_others_can_change_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = fleets(tmp_path, "one.yaml")
    here = Allowed((str(file),))
    for mode in (0o620, 0o602):
        file.chmod(mode)
        for tried in (here.environment, lambda: here.fleet("one")):
            with pytest.raises(ConfigError, match="can be changed by other users"):
                tried()
    file.chmod(0o644)
    assert here.fleet("one") == file
    with monkeypatch.context() as other:
        other.setattr(os, "getuid", lambda: 12345)
        if file.stat().st_uid:  # root's own files are anyone's to read
            with pytest.raises(ConfigError, match="belongs to another user"):
                here.fleet("one")
    file.unlink()
    os.mkfifo(file, 0o600)
    with pytest.raises(ConfigError, match="no regular file"):
        here.fleet("one")


def config(**values: Any) -> MigrationConfig:
    return MigrationConfig.model_validate(
        {"adapter": "org/a", "old_base": "org/old", "new_base": "other/new@main", "output": "out", **values}
    )


def test_code_and_task_files_are_the_operators_to_allow(tmp_path: Path) -> None:
    (tmp_path / "models" / "new").mkdir(parents=True)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "models" / "new")
    (tmp_path / "out.yaml").write_text("task: x\n")
    trusting = config(trust_remote_code=True)
    with pytest.raises(ConfigError) as refused:
        Allowed().check([trusting, trusting])
    assert [p.where for p in refused.value.problems] == [
        f"trust_remote_code: {model}" for model in ("org/old", "other/new@main", "org/a")
    ]
    Allowed((), ("org/*", "other/new")).check([trusting])
    for entry in ("other/newer", "*", "other", "/", "other/new/x", "org"):
        with pytest.raises(ConfigError, match="other/new@main"):
            Allowed((), ("org/*", entry)).check([trusting])
    local = config(trust_remote_code=True, new_base=str(tmp_path / "link"))
    Allowed((), ("org/*", str(tmp_path / "models"))).check([local])
    with pytest.raises(ConfigError):
        Allowed((), ("org/*", str(tmp_path / "tasks"))).check([local])
    for values in ({"include_path": str(tmp_path / "tasks" / "..")}, {"eval_tasks": [str(tmp_path / "out.yaml")]}):
        with pytest.raises(ConfigError, match="include_path"):
            Allowed((), (), (str(tmp_path / "tasks"),)).check([config(**values)])
    Allowed((), (), (str(tmp_path / "tasks"),)).check([config(include_path=str(tmp_path / "tasks"))])
    Allowed().check([config(eval_tasks=["boolq"])])


def test_runs_of_deployments_ask(
    on_worker: None, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small.settings("one", tmp_path / "out")
    for values in ({"trust_remote_code": True}, {"include_path": str(tmp_path)}):
        with pytest.raises(ConfigError, match="is not allowed on this worker"):
            migrate_adapter.fn({**settings, **values})
    with pytest.raises(ConfigError, match="is not allowed on this worker"):
        prepare_pair.fn(str(small.old), str(small.new), trust_remote_code=True)
    file = small.fleet(tmp_path / "fleet.yaml", ("one",), defaults={"trust_remote_code": True})
    file.chmod(0o600)
    for fleet in (str(file), {"pairs": []}):
        with pytest.raises(ConfigError, match="is not the name of a registered fleet"):
            migrate_fleet.fn(fleet)
    monkeypatch.setenv(FLEETS, str(file))
    with pytest.raises(ConfigError, match="small-new: is not allowed"):
        migrate_fleet.fn("fleet")
