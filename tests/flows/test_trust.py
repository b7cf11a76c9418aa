"""What is believed: sums of adapters by the command line, side files, and inputs that change while they are read."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import flow
from prefect.serializers import PickleSerializer
from typer.testing import CliRunner

from artifacts import Store
from flows.command_line import app
from lorasuite.adapters import Adapter
from lorasuite.errors import AdapterError, InputChanged
from lorasuite.reporting import push
from tasks.fingerprints import MEMORY
from tasks.stage import StageOutput, Where, stage
from tests.flows.small import Small


def run(*arguments: Any) -> dict[str, Any]:
    ran = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert ran.exit_code == 0, ran.output
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def migrate(small: Small, adapter: str, output: Path) -> dict[str, Any]:
    settings = small.settings("one", output, adapter=adapter)
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in settings.items()]
    return run("migrate", *(part for flag in flags for part in flag))


def test_a_sum_of_adapters_by_the_command_line(home: Path, small: Small, tmp_path: Path) -> None:
    parts = [small.root / "adapters" / name for name in ("one", "two")]
    text = f"{parts[0]}:0.7,{parts[1]}:.3"
    done = migrate(small, text, tmp_path / "out")
    assert done["adapter"]["name"] == "one+two" and done["adapter"]["rank"] == sum(Adapter.open(p).rank for p in parts)
    assert run("inspect", "--adapter", text, "--old-base", small.old, "--new-base", small.new)["problems"] == []
    # both side files damaged: said, made again, and the same migration comes out
    (home / MEMORY).write_text((home / MEMORY).read_text()[:100])
    combined = next(entry.key for entry in Store().ls() if entry.manifest and entry.manifest.stage == "combined")
    weights = Store().path(combined) / "files" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    again = migrate(small, text, tmp_path / "again")
    assert again["key"] == done["key"] and all(row["cached"] for row in again["timings"])
    Store().verify(combined)


def test_what_is_published_is_what_was_measured(home: Path, small: Small, tmp_path: Path) -> None:
    """One digest in the record, of the evaluation and on the card; another file is neither pushed nor done."""
    file = small.fleet(tmp_path / "fleet.yaml", ("one",))
    (row,) = run("fleet", file)["adapters"]
    output = Path(row["output"])
    record = json.loads((output / "migration.json").read_text())
    weights = output / "adapter_model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert record["weights_sha256"] == record["weights"]["migrated"] == digest
    assert digest in (output / "README.md").read_text() and digest in (output / "report.html").read_text()
    # what quotes rows is for its owner alone
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in (output / "samples").iterdir()} == {0o600}
    assert row["verdict"] != "ship" and "4 rows" in row["reason"]
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(AdapterError, match="not the adapter that was measured"):
        push(output, "org/name")
    ran = CliRunner().invoke(app, ["fleet", str(file), "--json"])
    assert ran.exit_code == 1 and "something other than" in ran.stdout


class Planted:
    """Runs code when it is read as a pickle."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@stage("numbers")
def numbers(inputs: Mapping[str, Any], settings: Any, where: Where) -> StageOutput:
    return StageOutput(info={"found": 1})


@flow
def counting(where: Where) -> str:
    return numbers.run(inputs={"text": "a"}, where=where).key


@pytest.mark.parametrize("kind", ["pickle", "backup", "object", "reference"])
def test_a_planted_record_of_a_result_is_not_read(kind: str, home: Path, tmp_path: Path) -> None:
    key = counting(Where())
    record, mark = home / "results" / key, tmp_path / "ran"
    sound = json.loads(record.read_text())
    planted = PickleSerializer().dumps(Planted(mark))
    if kind == "pickle":
        sound["metadata"]["serializer"] = {"type": "pickle", "picklelib": "cloudpickle", "picklelib_version": None}
        sound["result"] = planted.decode()
    elif kind == "object":
        sound["result"] = json.dumps({"__class__": "antigravity.fly_over", "data": {}})
    elif kind == "reference":
        sound["result"] = json.dumps({"stage": "numbers", "key": "0" * 64})
    record.write_bytes(planted if kind == "backup" else json.dumps(sound).encode())
    assert counting(Where()) == key and not mark.exists() and "antigravity" not in sys.modules
    again = json.loads(record.read_text())
    assert again["metadata"]["serializer"]["type"] == "json" and json.loads(again["result"])["key"] == key


def test_a_sum_of_adapters_in_a_fleet(home: Path, small: Small, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(small.root / "adapters" / name, tmp_path / name)
    file = small.fleet(tmp_path / "fleet.yaml", ("one",))
    content = yaml.safe_load(file.read_text())
    content["pairs"][0]["adapters"] = [{"adapter": "one:0.7,two:0.3"}]
    file.write_text(yaml.safe_dump(content))
    for cached in (False, True):
        (row,) = run("fleet", file)["adapters"]
        assert (row["name"], row["cached"]) == ("one+two", cached)


def test_what_was_computed_of_a_base_that_changed_meanwhile_is_not_kept(
    home: Path, small: Small, tmp_path: Path
) -> None:
    base = shutil.copytree(small.old, tmp_path / "base")

    @stage("reads", retry_delays=())
    def reads(inputs: Mapping[str, Any], settings: Any, where: Where) -> StageOutput:
        if settings["changes"]:
            file = where.path("base") / "model.safetensors"
            file.write_bytes(file.read_bytes())
        return StageOutput(info={"found": 1})

    @flow
    def reading(changes: bool, where: Where) -> str:
        return reads.run(inputs={"base": "a"}, settings={"changes": changes}, where=where).key

    where = Where(paths={"base": base})
    key = reading(False, where)
    assert Store().has(key)
    with pytest.raises(InputChanged, match="changed while it was read"):
        reading(True, where)
    Store().remove(key)
    with pytest.raises(InputChanged):  # what it looked like when it was fingerprinted counts
        reading(False, where)
    assert not list(Store().ls())
    assert Store().has(reading(False, Where(paths={"base": base})))
