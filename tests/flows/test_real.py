"""The grid of real models, on a miniature pair given as any other: by directories and files of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.real.__main__ import main
from lorasuite import zoo

GRID: dict[str, Any] = {
    "name": "tiny",
    "settings": {"finetune_samples": 8, "evaluation": {"limit": 4, "max_new_tokens": 4}},
    "lora": {"rank": 8, "scaling": 2},
    "tables": {
        "first": {"title": "First", "set": {"finetune.epochs": 1}, "arms": ["new", "scratch"]},
        "second": {"title": "Second", "set": {"finetune.epochs": 1}, "arms": ["scratch", "migrated", "migrated+lft"]},
    },
}


def test_cells_are_kept_one_file_each_and_runs_go_on(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], plugins: None
) -> None:
    pair, cells = zoo.pair("llama"), tmp_path / "cells"
    grid, train, test = tmp_path / "tiny.yaml", tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    grid.write_text(yaml.safe_dump(GRID))
    zoo.write_rows(zoo.rows("llama", "mirror", "train", 20), train)
    zoo.write_rows(zoo.rows("llama", "mirror", "test", 6), test)
    arguments = [
        "--grid", str(grid), "--old-base", str(pair.old), "--new-base", str(pair.new), "--task", "mirror",
        "--train", str(train), "--test", str(test), "--adapter", str(pair.adapter("mirror")),
        "--work", str(tmp_path / "work"), "--cells", str(cells),
    ]  # fmt: skip

    main(["run", *arguments, "--only", "first"])
    assert "2 cells" in capsys.readouterr().out
    found = {path.name: json.loads(path.read_text()) for path in cells.glob("*/*.json")}
    assert sorted(found) == [
        "mirror--tiny--new--seed0.json",
        "mirror--tiny--scratch--8rows--0.001--finetune.epochs=1--seed0.json",
    ]
    tuned = found["mirror--tiny--scratch--8rows--0.001--finetune.epochs=1--seed0.json"]
    assert tuned["settings"] == {"finetune.epochs": "1"}
    assert tuned["n"] == len(tuned["samples"]) == 4 and tuned["seconds"]["finetune"] > 0
    assert tuned["tokens_trained_on"] > 8 and tuned["peak_memory_bytes"] > 0 and tuned["method"] is None
    assert str(tmp_path) not in json.dumps(found) and str(pair.old.parent) not in json.dumps(found)

    main(["run", *arguments])
    assert "4 cells" in capsys.readouterr().out
    for name, cell in found.items():
        assert json.loads(next(cells.glob(f"*/{name}")).read_text()) == cell, "not computed again"
    main(["collect", *arguments])
    assert "4 cells" in capsys.readouterr().out
