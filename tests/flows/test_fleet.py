"""Fleets: one pair prepared once, single failures survived, a second run that computes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from artifacts import Store
from flows.command_line import app
from flows.migrate_fleet import Failure, _prepare
from lorasuite import zoo
from lorasuite.errors import ConfigError
from lorasuite.planning import read_fleet
from tests import models
from tests.flows.small import BROKEN, NAMES, Small


def fleet(*arguments: Any) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["fleet", *map(str, arguments), "--json"])
    assert result.stdout, result.output
    return result.exit_code, json.loads(result.stdout)


def objects() -> dict[str, tuple[str, str]]:
    """Key of every artifact → its stage and when it was computed."""
    entries = [entry.manifest for entry in Store().ls() if entry.manifest]
    return {entry.key: (entry.stage, entry.created.isoformat()) for entry in entries}


def zoo_fleet(folder: Path) -> tuple[Path, list[str]]:
    """A fleet file of both of the zoo's pairs, its outputs beside it; and its adapters' names, the broken one last."""
    broken = shutil.copytree(zoo.pair("neox").adapter("orbit"), folder / BROKEN)
    (broken / "adapter_model.safetensors").write_bytes(b"not a safetensors file")
    adapters: dict[str, list[dict[str, str]]] = {
        name: [
            {
                "adapter": str(zoo.pair(name).adapter(task)),
                "eval_data": f"{name}-{task}.jsonl",
                "name": f"{name}-{task}",
            }
            for task in tasks
        ]
        for name, tasks in {"llama": ("mirror", "drift", "blend"), "neox": ("mirror", "drift")}.items()
    }
    for name, rows in adapters.items():
        for row in rows:
            zoo.write_rows(zoo.rows(name, row["name"].split("-")[1], "test", 8), folder / row["eval_data"])
        zoo.write_rows([{"text": text} for text in zoo.texts(name, 16)], folder / f"{name}-texts.jsonl")
    adapters["neox"].append({"adapter": str(broken)})
    pairs = [
        {
            "old_base": str(zoo.pair(name).old),
            "new_base": str(zoo.pair(name).new),
            "defaults": {
                "calibration": f"{name}-texts.jsonl",
                "method": "lorasuite",
                "evaluation": {"generate": False},
            },
            "adapters": rows,
        }
        for name, rows in adapters.items()
    ]
    file = folder / "fleet.yaml"
    file.write_text(yaml.safe_dump({"pairs": pairs}))
    return file, [row.get("name", BROKEN) for rows in adapters.values() for row in rows]


def test_six_adapters_of_the_zoo_of_which_one_is_broken(home: Path, tmp_path: Path) -> None:
    file, names = zoo_fleet(tmp_path)
    sound = names[:-1]
    code, first = fleet(file)
    rows = {row["name"]: row for row in first["adapters"]}
    assert code == 1
    assert list(rows) == names and len(names) == 6
    assert {rows[name]["verdict"] for name in sound} <= {"ship", "needs-finetune", "retrain"}
    assert first["verdicts"]["failed"] == 1
    assert "cannot be read" in rows[BROKEN]["reason"] or "safetensors" in rows[BROKEN]["reason"]
    assert rows[BROKEN]["retry"] == f"lorasuite fleet {file} --only {BROKEN}"
    for name in sound:
        assert Path(rows[name]["report"]).is_file() and not rows[name]["cached"]
    stages = [stage for stage, _ in objects().values()]
    assert stages.count("head_mapping") == stages.count("similarity") == 2, "each pair was prepared once"
    assert stages.count("transform") == len(sound)

    before = objects()
    code, second = fleet(file)
    assert code == 1 and objects() == before, "nothing was computed again"
    assert all(row["cached"] for row in second["adapters"] if row["name"] != BROKEN)
    assert [row["verdict"] for row in second["adapters"]] == [row["verdict"] for row in first["adapters"]]


def test_what_is_missing_and_only_that(home: Path, small: Small, tmp_path: Path) -> None:
    file = small.fleet(tmp_path / "fleet.yaml", NAMES[:2])
    code, first = fleet(file, "--only", "two")
    assert code == 0 and [row["name"] for row in first["adapters"]] == ["two"]
    code, both = fleet(file)
    assert {row["name"]: row["cached"] for row in both["adapters"]} == {"one": False, "two": True}

    # Another gate needs no new migration.
    small.fleet(file, NAMES[:2], gate={"metric": "tasks"})
    assert {row["verdict"] for row in fleet(file)[1]["adapters"]} == {"unmeasured"}
    # A directory that holds something else is not touched, and not taken for the result.
    small.fleet(
        file, NAMES[:1], defaults={"rank": 2, "method": "lorasuite", "calibration": str(small.root / "texts.jsonl")}
    )
    code, other = fleet(file)
    assert code == 1 and "something other than these inputs" in other["adapters"][0]["reason"]


def test_a_new_base_in_place_of_the_files(home: Path, small: Small, tmp_path: Path) -> None:
    file = small.fleet(tmp_path / "fleet.yaml", NAMES[:1])
    parts = read_fleet(file, new_base=str(small.old), old_base=str(small.old))
    assert parts["one"].new_base == str(small.old)
    assert Path(parts["one"].output) == tmp_path / "migrated" / "small-old" / "one"
    with pytest.raises(ConfigError, match="no pair has the old base elsewhere"):
        read_fleet(file, old_base="elsewhere")


def test_a_pair_is_prepared_for_what_its_adapters_try(small: Small, tmp_path: Path) -> None:
    models.build_adapter(tmp_path / "values", small.old, targets=["v_proj"])
    parts = read_fleet(small.fleet(tmp_path / "fleet.yaml", NAMES))
    changes: dict[str, dict[str, Any]] = {
        "one": {"method": "procrustes"},
        "two": {"method": "auto", "train_data": str(small.root / "train.jsonl")},
        "three": {"method": "auto", "teacher_samples": 0, "candidates": ("lorasuite", "procrustes")},
        "four": {"adapter": str(tmp_path / "values")},
        "five": {"new_base": str(tmp_path / "nowhere")},
    }
    asked: list[dict[str, Any]] = []

    def start(deployment: str, runs: Mapping[str, dict[str, Any]]) -> dict[str, Failure | None]:
        asked.extend(runs.values())
        return dict.fromkeys(runs)

    failed = _prepare({name: config.model_copy(update=changes[name]) for name, config in parts.items()}, start, ())
    assert [(run["roles"], run["methods"]) for run in asked] == [
        (["q", "o"], ["procrustes", "lorasuite"]),  # of the second, rows are trained into a fresh LoRA: copy fits not
        (["v"], ["lorasuite"]),
    ]
    assert list(failed) == ["five"] and "nowhere" in failed["five"].reason


def test_mistakes_come_at_once(small: Small, tmp_path: Path) -> None:
    file = small.fleet(
        tmp_path / "fleet.yaml",
        pairs=[
            {
                "old_base": str(small.old),
                "new_base": "../new",
                "adapters": [
                    {"adapter": "a", "methd": "copy"},
                    {"adapter": "b", "rank": 0},
                    {"adapter": "c", "output": "x"},
                    {"adapter": "same"},
                    {"adapter": "x/same"},
                ],
            }
        ],
    )
    with pytest.raises(ConfigError) as caught:
        read_fleet(file)
    text = str(caught.value)
    for words in ("adapters.0: methd", "Did you mean 'method'", "adapters.1: rank", "adapters.2.output", "same"):
        assert words in text
    file.write_text("pairs: []\nouput: x\n")
    with pytest.raises(ConfigError, match="Did you mean 'output'"):
        read_fleet(file)
    assert fleet(file)[0] == 2


def test_settings_paths_and_names(small: Small, tmp_path: Path) -> None:
    (tmp_path / "bases" / "old").mkdir(parents=True)
    file = tmp_path / "fleet.yaml"
    file.write_text(
        """
output: out
defaults: {rank: 4, finetune: {epochs: 2}}
pairs:
  - old_base: bases/old
    new_base: org/new@abc
    defaults: {finetune: {batch_size: 4}}
    adapters:
      - {adapter: org/adapter, train_data: data/train.jsonl, name: mine, finetune: {epochs: 5}}
      - {adapter: org/other}
  - {old_base: org/old, new_base: org/newer, adapters: [{adapter: org/other}]}
"""
    )
    parts = read_fleet(file)
    assert list(parts) == ["mine", "new@abc/other", "newer/other"]
    mine = parts["mine"]
    assert (mine.old_base, mine.new_base) == (str(tmp_path / "bases" / "old"), "org/new@abc")
    assert (mine.adapter, mine.train_data) == ("org/adapter", str(tmp_path / "data" / "train.jsonl"))
    assert mine.output == str(tmp_path / "out" / "new@abc" / "mine")
    assert (mine.rank, mine.finetune.epochs, mine.finetune.batch_size) == (4, 5, 4)
