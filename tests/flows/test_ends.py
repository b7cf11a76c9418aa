"""Servers that commands start, and how a run that was stopped leaves them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from contextvars import Context
from pathlib import Path
from typing import Any

import prefect.context
import psutil
import pytest
import torch
from prefect import flow
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_AUTH_STRING
from typer.testing import CliRunner

import flows.migrate_adapter as module
from artifacts import Store
from flows import repair, temporary_server
from flows.command_line import app
from lorasuite.errors import MachineError
from tasks import stage
from tests.flows.small import Small


def test_the_temporary_server_is_watched(shared_server: dict[str, Any]) -> None:
    """The one of these tests was started by Prefect, in our way: in its own session, and known to a watchdog."""
    process = psutil.Process(shared_server["pid"])
    assert "uvicorn" in process.cmdline() and os.getsid(process.pid) == process.pid
    parent = process.parent()
    assert parent is not None
    assert any("watchdog.py" in " ".join(child.cmdline()) for child in parent.children())


def test_the_temporary_server_answers_its_own_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it asks for is what clients of this process show, in whatever thread, and nothing that another knows."""
    monkeypatch.setattr(prefect.context, "GLOBAL_SETTINGS_CONTEXT", prefect.context.GLOBAL_SETTINGS_CONTEXT)
    started: list[dict[str, str]] = []

    def popen(command: list[str], env: dict[str, str], **_: Any) -> psutil.Process:
        started.append(env)
        return psutil.Process()

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(temporary_server.watchdog, "keep", lambda pid: None)
    monkeypatch.setattr(temporary_server, "_answering", lambda *_: None)
    for _ in range(2):
        Context().run(temporary_server.start, SubprocessASGIServer(port=1))
    first, second = (env["PREFECT_SERVER_API_AUTH_STRING"] for env in started)
    assert first == second == Context().run(PREFECT_API_AUTH_STRING.value) and len(first) > 40
    assert first not in os.environ.values()


class Said:
    """A server that said something and ended, or that answers."""

    def __init__(self, *said: str) -> None:
        self.said = iter(said)

    def __call__(self, *_: object) -> str | None:
        return next(self.said, None)


def test_a_server_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = tmp_path / "not" / "there"
    monkeypatch.setattr(temporary_server, "PREFECT_HOME", type("Place", (), {"value": lambda _: place})())
    ports: list[int] = []
    monkeypatch.setattr(temporary_server, "_lock", lambda: None)
    monkeypatch.setattr(temporary_server, "_started", ports.append)
    trace = "Traceback (most recent call last):\n  File x\nsqlite3.OperationalError: disk is full\n\n"
    monkeypatch.setattr(temporary_server, "_answering", Said(trace))
    with pytest.raises(MachineError, match=r"OperationalError: disk is full.*PREFECT_HOME"):
        temporary_server.start(SubprocessASGIServer(port=11))
    monkeypatch.setattr(temporary_server, "_answering", Said("ERROR: [Errno 98] address already in use\n"))
    temporary_server.start(SubprocessASGIServer(port=12))
    assert ports[:2] == [11, 12] and len(ports) == 3 and ports[2] != 12, "another port is tried"
    assert place.is_dir(), "Prefect makes no parents of it"


def test_an_output_that_is_whole_is_done(
    home: Path, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails behind its publication; and its migration, asked for again, says so and computes nothing."""
    output, left = tmp_path / "out", tmp_path / ".out.0123abcd.partial"
    left.mkdir()
    settings = small.settings("one", output)

    def no_server(*_: object, **__: object) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(module, "show_migration", no_server)
    first = module.migrate_adapter(settings)
    assert output.is_dir() and not left.exists() and "done_before" not in first
    given = {f"--{name.replace('_', '-')}": value for name, value in settings.items() if name != "output"}
    flags = [part for pair in given.items() for part in pair]

    def run(*more: str) -> tuple[int, dict[str, Any]]:
        done = CliRunner().invoke(app, ["migrate", *flags, "--json", *more])
        return done.exit_code, json.loads(done.stdout)

    before = sorted(entry.key for entry in Store(home).ls())
    with monkeypatch.context() as patched:
        patched.setattr(module, "migrate_adapter", no_server)
        code, again = run("--output", str(output))
    assert code == 0 and again.pop("done_before") and again == {**first, "output": str(output)}
    assert sorted(entry.key for entry in Store(home).ls()) == before
    code, other = run("--output", str(output), "--rank", "2")
    assert code == 2 and "exists already" in other["message"], "it is another migration's"
    assert module.migrate_adapter(settings)["done_before"], "a retry of the run in the dashboard, too"

    for folder in ("results", "locks"):
        shutil.rmtree(home / folder)
    real = module.migrate_adapter

    def dies_behind(*args: Any, **named: Any) -> None:
        real(*args, **named)
        no_server()

    monkeypatch.setattr(module, "migrate_adapter", dies_behind)
    monkeypatch.setattr(stage, "_writable", lambda _home: False)
    code, whole = run("--output", str(tmp_path / "second"))
    assert code == 0 and whole["weights_sha256"] == first["weights_sha256"] and "done_before" not in whole
    assert all(row["cached"] for row in whole["timings"]) and not (home / "results").exists()
    assert not (home / "locks").exists(), "a home that is read-only is read"


@stage.stage("first of two")
def first_stage(inputs: Mapping[str, Any], settings: Any, where: stage.Where) -> stage.StageOutput:
    text = (where.path("data") / "x").read_text()
    return stage.StageOutput(tensors={"x": torch.full((3,), float(len(text)))}, files={"text": text.encode()})


@stage.stage("second of two")
def second_stage(inputs: Mapping[str, Any], settings: Any, where: stage.Where) -> dict[str, Any]:
    again = (where.path("data").parent / "again").exists()
    return {"sum": inputs["x"].tensor("x").sum().item() + again, "seconds": time.perf_counter()}


def test_artifacts_are_repaired_and_checked(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "STAGES", {made.name: made for made in (first_stage, second_stage)})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x").write_text("four")

    @flow
    def both() -> list[str]:
        where = stage.Where(paths={"data": tmp_path / "data"})
        one = first_stage.run(inputs={"x": "f" * 64}, where=where)
        return [one.key, second_stage.run(inputs={"x": one}, settings={"a": 1}, where=where).key]

    keys, store = both(), Store(home)

    def artifacts(*arguments: str) -> tuple[int, dict[str, Any]]:
        done = CliRunner().invoke(app, ["artifacts", *arguments, "--json"])
        return done.exit_code, json.loads(done.stdout)

    assert [artifacts("check", key[:20])[1]["different"] for key in keys] == [[], []]
    files = [store.path(key) / "data.safetensors" for key in keys]
    sound = [file.read_bytes() for file in files]
    for file in files:
        file.write_bytes(b"damage")
    code, told = artifacts("verify")
    assert code == 1 and set(told["damaged"]) == set(keys)
    code, told = artifacts("verify", "--repair")
    assert code == 0 and told["repaired"] == dict.fromkeys(keys, "computed again") and told["damaged"] == {}
    assert [file.read_bytes() for file in files] == sound and artifacts("verify")[0] == 0

    (tmp_path / "again").touch()
    assert artifacts("check", keys[1])[1]["different"] == ["sum"] and artifacts("check", keys[1])[0] == 1
    (tmp_path / "data" / "x").write_text("another")
    files[0].write_bytes(b"damage")
    code, told = artifacts("verify", "--repair")
    assert code == 1 and "not what it was" in told["damaged"][keys[0]] and not told["repaired"]
    code, told = artifacts("check", keys[1])
    assert code == 2 and told["problems"][0]["where"] == str(tmp_path / "data")
