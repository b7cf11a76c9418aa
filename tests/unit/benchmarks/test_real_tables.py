"""The tables of docs/evidence.md: what stands in them, what is missing, and that the page is made of the cells."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real import default
from benchmarks.real.__main__ import CELLS, PAGE, README
from benchmarks.real.headline import screen
from benchmarks.real.headline import table as headline
from benchmarks.real.tables import (
    BEGIN,
    END,
    PICTURE,
    SWEEPS,
    costs,
    filled,
    groups,
    headlines,
    markdown,
    read,
    table,
    write,
)

LORA = {"rank": 4, "targets": ["q", "v"]}


def cell(arm: str, right: int, loss: float = 1.0, rate: float | None = None, **changes: Any) -> dict[str, Any]:
    samples = [
        {
            "index": n,
            "target": "a",
            "output": "a" if n < right else "b",
            "exact_match": n < right,
            "loglikelihood": -loss,
            "tokens": 1,
            "bytes": 1,
        }
        for n in range(10)
    ]
    return {
        "old_base": "old", "new_base": "new", "task": "t", "grid": "g", "arm": arm, "method": None, "lora": LORA,
        "rows": rate and 100, "epochs": rate and 3, "learning_rate": rate, "seed": 0, "loss": loss, "n": 10,
        "exact_match": right / 10, "device": "cpu", "bits_per_byte": loss / math.log(2), "peak_memory_bytes": 2**30,
        "seconds": {"finetune": 4.0, "transform": 2.0},
        "tokens_trained_on": rate and 300, "samples": samples, **changes,
    }  # fmt: skip


@pytest.fixture
def cells() -> list[dict[str, Any]]:
    moved = {"method": "lorasuite"}
    return [
        cell("new", 0, 5.0),
        cell("scratch", 3, 0.8, 0.001),
        cell("scratch", 9, 0.9, 0.003),
        cell("migrated", 0, 21.0, **moved),
        cell("migrated+lft", 8, 0.7, 0.001, **moved),
    ]


def test_a_line_for_each_start_and_the_best_of_each_against_the_control(cells: list[dict[str, Any]]) -> None:
    rows = {line.split(" | ")[0][2:]: line for line in table(cells).split("\n")}
    assert rows["new base, bare"].startswith("| new base, bare | 5.00, 0% |")
    assert rows["a fresh LoRA"] == "| a fresh LoRA |  | not run | 0.80, 30% | 0.90, 90% |  |"
    moved = rows["equation 3 (`lorasuite`)"]
    assert "| 21.00, 0% | not run | 0.70, 80% | not run |" in moved
    assert "+50 [+20, +80] points; -0.14 [-0.14, -0.14] bits/byte" in moved, "by loss, the best fresh LoRA is at 1e-3"


def test_cells_of_other_settings_are_lines_of_their_own() -> None:
    """Where no fresh LoRA was trained on labelled rows, they are compared with the plain one."""
    plain, further = cell("refreshed", 3, 0.8, 0.001), cell("refreshed", 9, 0.6, 0.001)
    rows = table([further | {"settings": {"second_step": "cached"}}, plain]).split("\n")
    name = "a fresh LoRA, on 100 rows that the old adapter wrote, no label"
    assert f"best − best of {name} [95 %]" in rows[0]
    assert rows[2] == f"| {name} |  | not run | 0.80, 30% | not run |  |"
    assert rows[3].startswith(f"| {name}; `second_step` cached |  | not run | 0.60, 90% | not run | +60 [")


def test_pages_and_pictures_are_written_between_the_marks(cells: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "cells/old--new"
    folder.mkdir(parents=True)
    for n, one in enumerate([*cells, cell("refreshed", 5, 0.6, 0.001, grid="h")]):
        (folder / f"{n}.json").write_text(json.dumps(one))
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    write(tmp_path / "cells", page)
    text = page.read_text()
    assert text.startswith("Before.") and text.endswith(f"{END}\n\nAfter.\n") and "\nold\n" not in text
    assert [name[-1] for name, _ in groups(read(tmp_path / "cells"))] == ["g", "h"]
    assert "Rank 4 on q, v; 10 test rows, seed 0; fine-tunes of 3 epochs on 100 rows. Nats per" in text
    assert "| migrated, w LFT | CPU | 1 | 6 | 2.0 | 1.0 | 300 |" in text
    assert (tmp_path / SWEEPS).stat().st_size > 5_000 and not (tmp_path / PICTURE).exists()
    write(tmp_path / "cells", page)
    assert page.read_text() == text


def test_the_page_is_in_step_with_the_cells() -> None:
    text = PAGE.read_text(encoding="utf-8")
    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    cells = read(CELLS)
    assert shown == markdown(cells), "run: python -m benchmarks.real tables"
    assert PAGE.with_name(PICTURE).is_file() and PAGE.with_name(SWEEPS).is_file()
    for page in (text, README.read_text(encoding="utf-8")):
        assert screen(cells) in page and filled(page, cells) == page, "run: python -m benchmarks.real tables"


def test_what_each_device_took_stands_apart() -> None:
    found = costs(
        [cell("scratch", 3, 1.0, 0.001), cell("scratch", 3, 1.0, 0.003, device="cuda", seconds={"finetune": 1})]
    )
    assert "| LoRA (small) | CPU | 1 | 6 | 2.0 | 1.0 | 300 |" in found
    assert "| LoRA (small) | GPU | 1 | 1 | 0.0 | 1.0 | 300 |" in found


def test_a_run_of_the_whole_command_is_kept_without_a_path(tmp_path: Path) -> None:
    scores = {"exact_match": 0.5, "loss": 1.0, "bits_per_byte": 0.4, "n": 10, "samples": "not kept"}
    bases = {f"{side}_base": {"name": side, "id": f"/here/{side}"} for side in ("old", "new")}
    stages = [
        ("activations", "old", 3),
        ("teacher", None, 5),
        ("search", None, 7),
        ("evaluate", "a", 2),
        ("evaluate", "b", 2),
    ]
    record = bases | {
        "adapter": {"rank": 16}, "teacher": {"written": 300}, "seed": 42, "versions": {}, "general": {"costs": []},
        "finetune": {"steps": 57, "samples": 300, "learning_rate": 0.001, "search": {"steps": 85}},
        "evaluation": {"old+adapter": scores, "migrated+lft": scores}, "peak_memory_bytes": {"search": 2**30},
        "verdict": {"verdict": "ship", "kept": 1.0, "kept_interval": None, "reason": "…"},
        "timings": [{"stage": stage, "label": label, "computed_seconds": s} for stage, label, s in stages],
        "settings": {"old_base": "/here/old", "prompts": "/here/prompts.jsonl", "finetune": {"batch_size": 8}},
    }  # fmt: skip
    (tmp_path / "migration.json").write_text(json.dumps(record))
    kept = default.keep(tmp_path, "t", tmp_path / "kept")
    assert kept.name == "old--new--t--300rows--seed42.json"
    assert "/here" not in kept.read_text() and "not kept" not in kept.read_text()
    (run,) = default.read(tmp_path / "kept")
    assert default.spent(run) == (3, 5, 7, 2), "one adapter under two names is evaluated once"
    assert "| old → new, t | 300 written | 50%, 1.00 nats | 50%, 1.00 nats | 100% | 85 + 57 of 8 |" in default.table(
        [run]
    )


def test_a_headline_of_every_way_against_the_retrain() -> None:
    grid = {"grid": "all-linear"}
    many = {**grid, "rows": 1000, "tokens_trained_on": 3000}
    found = [
        cell("new", 0, 5.0, **grid),
        cell("old+adapter", 9, 0.5, **grid),
        cell("retrained", 8, 1.0, 0.001, **many),
        *(cell("scratch", 3 + seed, 3.0 - seed, 0.001, **grid, seed=seed) for seed in (0, 1)),
        cell("scratch", 9, 4.0, 0.003, **grid),
        cell("scratch", 9, 0.1, 0.001, **grid, settings={"finetune.epochs": "10"}),
        cell("migrated+lft", 1, 2.0, 0.001, **grid, method="procrustes"),
        cell("refreshed", 4, 3.0, 0.001, **grid),
        cell("refreshed", 9, 0.1, 0.001, **grid, prompts={"sources": ["adapter"], "given": 0}),
        cell("refreshed", 6, 0.4, 0.001, **grid, settings={"given.labelled": "50"}),
    ]
    lines = {line.split(" | ")[0][2:]: line for line in headline(found).split("\n")}
    assert lines["LoRA on 100 rows"].split(" | ")[1:-2] == ["2", "35.0% [30.0%, 40.0%]", "0.44", "2.50", "0.62"]
    assert "| 9 |" not in lines["LoRA on 100 rows"] and lines["LoRA on 100 rows"].endswith(
        "10.0% of the retrain's | 1.0 |"
    )
    assert "100.0%" not in lines["old base + adapter"] and "| 1.00 |" in lines["retrained on 1,000 rows"]
    assert "`procrustes` + LFT on 100 rows, the best of the others" in lines
    assert lines["100 rows that the old adapter wrote, no label"].split(" | ")[2] == "40.0%", "of given prompts"
    assert lines["100 written rows and 50 labelled ones"].split(" | ")[2] == "60.0%"
    assert lines["100 written rows, prompts from adapter"].split(" | ")[2] == "90.0%"
    assert headline(found[:2]) == ""
    others = [cell("scratch", 9, 0.1, 0.001, grid="paper"), *({**one, "grid": "strong"} for one in found[:3])]
    first, second = headlines([*found, *others]).split("\n\n**")
    assert "`all-linear`" in first and first.endswith(headline(found)), "a grid's cells are of one old adapter"
    assert "`strong`" in second and second.count("\n| ") == 5
    alike = [{**one, "grid": "discovery"} for one in found if one.get("prompts") or one["arm"] == "old+adapter"]
    joined = headlines([*({**one, "grid": "strong"} for one in found[:3]), *alike])
    assert joined.count("prompts from adapter") == 1 and joined.count("old base + adapter") == 1
