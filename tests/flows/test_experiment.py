"""An experiment from the command line: killed, looked at, and gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from artifacts import Store
from flows.command_line import app
from flows.migrate_adapter import migrate_adapter
from lorasuite import zoo
from lorasuite.planning import ARMS

CONTENT: dict[str, Any] = {
    "name": "tiny",
    "pair": {"zoo": "llama"},
    "tasks": {"mirror": {"zoo": "mirror", "ready": True, "eval_rows": 6}},
    "settings": {"finetune_samples": 8, "finetune": {"epochs": 1}, "evaluation": {"max_new_tokens": 8}},
    "lora": {"rank": 8, "scaling": 2},
    "tables": {
        "main": {"title": "The seven rows"},
        "layers": {"title": "Layers", "factors": {"pair.layer_strategy": ["dp", "first"]}, "arms": ["migrated"]},
    },
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    return path


def run(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["experiment", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def made(home: Path) -> dict[str, tuple[Any, str]]:
    """When each artifact was made, and what it holds."""
    return {e.key: (e.manifest.created, e.manifest.digest) for e in Store(home).ls() if e.manifest}


def states(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(cell["table"], cell["arm"], cell["state"]) for cell in found["cells"]]


def test_a_killed_experiment_goes_on_where_it_was(file: Path, home: Path, prefect_server: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = [str(file), "--output", str(output)]
    child = subprocess.Popen(
        [sys.executable, "-c", "from flows.command_line import main; main()", "experiment", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PREFECT_API_URL": prefect_server, "PREFECT_LOGGING_LEVEL": "INFO"},
    )
    assert child.stderr is not None
    for line in child.stderr:  # in the middle of the fifth cell: the control's training
        if "finetune (scratch): " in line:
            child.kill()
            break
    assert child.wait() == -9, "it was killed while it worked"
    before = {
        entry.key: (entry.manifest.created, entry.manifest.digest) for entry in Store(home).ls() if entry.manifest
    }

    looked = states(run(*arguments, "--dry-run"))
    assert looked[:7] == [("main", arm, "cached" if n < 4 else "to do") for n, arm in enumerate(ARMS)]
    assert looked[7:] == [("layers", "migrated", "cached"), ("layers", "migrated", "to do")]
    assert made(home) == before, "a look computes nothing"

    result = run(*arguments)
    assert (result["cells"], result["cached"], result["computed"], result["failed"]) == (9, 5, 4, [])
    after = made(home)
    assert before == {key: after[key] for key in before}, "what was finished was not made again"
    rows = {row[0]: row[1] for row in result["tables"]["main"]["rows"]}
    assert rows["old base + LoRA (full)"] == rows["LoRA (full)"] == "100.0 ± 0.0"
    assert rows["old base"] == rows["new base"] == "0.0 ± 0.0"
    assert (output / "figures/main.png").is_file() and "| migrated, w LFT |" in (output / "results.md").read_text()

    kept = (output / "results.csv").read_text()
    again = run(*arguments, "--only", "main")
    assert (again["cached"], again["computed"], list(again["tables"])) == (7, 0, ["main"])
    assert (output / "results.csv").read_text() == kept, "the other table is still there"


def test_the_sequential_fit_and_rows_without_labels(
    file: Path, home: Path, prefect_server: str, tmp_path: Path
) -> None:
    settings = {**CONTENT["settings"], "teacher_samples": 12, "teacher": {"max_new_tokens": 12}}
    content = {
        **CONTENT,
        "settings": settings,
        "tables": {
            "sequential": {"title": "Fit", "set": {"method": "sequential"}, "arms": ["migrated", "migrated+lft"]},
            "refresh": {"title": "No labels", "arms": ["refreshed"]},
            "beside": {"title": "Labels beside", "set": {"given.labelled": 6}, "arms": ["refreshed"]},
            "cost": {"title": "Cost", "kind": "cost", "tasks": ["own"], "arms": ["migrated", "refreshed", "retrained"]},
        },
        "tasks": {**CONTENT["tasks"], "own": {"zoo": "mirror", "eval_rows": 6, "set": {"method": "sequential"}}},
        "retrain": {"rows": 16, "finetune": {"epochs": 1}},
    }
    own = ("sequential", "refresh", "beside")
    content["tables"] |= {name: {**content["tables"][name], "tasks": ["mirror"]} for name in own}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    arguments = [str(file), "--output", str(tmp_path / "out")]
    result = run(*arguments)
    assert (result["cells"], result["computed"], result["failed"]) == (7, 7, [])
    manifests = [one.manifest for one in Store(home).ls() if one.manifest is not None]
    trained = {manifest.info["samples"] for manifest in manifests if manifest.stage == "finetune"}
    assert {12, 12 + 6} <= trained, "what was written, and six labelled rows beside it"
    assert [row[0] for row in result["tables"]["refresh"]["rows"]] == ["refreshed (no labels)"]
    assert all(row[2] != "–" for row in result["tables"]["cost"]["rows"][:2]), "fits and written rows cost time"
    assert {state for _, _, state in states(run(*arguments, "--dry-run"))} == {"cached"}

    # A migration of the same adapter, with the same settings, gives the same rows and the same fit.
    pair, data = zoo.pair("llama"), tmp_path / "out/data/mirror"
    shared = {
        "adapter": str(pair.adapter("mirror")), "old_base": str(pair.old), "new_base": str(pair.new),
        "calibration": str(data / "calibration.jsonl"), "prompts": str(data / "train_data.jsonl"),
        "controls": False, "seed": 0, "method": "lorasuite", **settings,
    }  # fmt: skip
    record = migrate_adapter({**shared, "output": str(tmp_path / "refreshed"), "finetune_samples": 0})
    assert next(row["cached"] for row in record["timings"] if row["stage"] == "teacher")
    fit = {"method": "sequential", "prompts": None, "train_data": str(data / "train_data.jsonl"), "teacher_samples": 0}
    record = migrate_adapter({**shared, "output": str(tmp_path / "fitted"), **fit, "finetune": {"max_steps": 1}})
    shared_stages = {row["stage"] for row in record["timings"] if row["cached"]}
    assert {"split", "model_fit", "state_map"} <= shared_stages, "one set of artifacts for both"


def test_bases_that_are_not_here_are_not_fetched_for_a_look(file: Path, home: Path, tmp_path: Path) -> None:
    content = {
        **CONTENT,
        "pair": {"old_base": "nobody/old-base", "new_base": "nobody/new-base"},
        "tasks": {"mirror": {"train_data": "train.jsonl", "eval_data": "test.jsonl"}},
    }
    file.write_text(yaml.safe_dump(content))
    found = run(str(file), "--output", str(tmp_path / "out"), "--dry-run")
    assert {state for _, _, state in states(found)} == {"not known"} and len(found["cells"]) == 9
    assert not home.exists()


def test_an_output_of_something_else_is_refused(file: Path, home: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("all of it")
    done = CliRunner().invoke(app, ["experiment", str(file), "--output", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 2 and "holds something else" in done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
