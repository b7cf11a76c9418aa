"""What is predicted of a cell from others: that a real relation is found, that chance is not, and what is shown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.real.__main__ import CELLS, PAGE
from benchmarks.real.predict import (
    BEGIN,
    END,
    FEATURES,
    FRESH,
    OUTLOOK,
    TAUGHT,
    Known,
    against_mean,
    best,
    errors,
    known,
    markdown,
    mean_error,
    outlook,
    write,
)
from tests.unit.benchmarks.test_real_tables import cell


def pairs(count: int, relation: float, seed: int = 0) -> list[Known]:
    """Two tasks a pair; what the ways keep follows the second statistic by ``relation``, and else is drawn."""
    rng = np.random.default_rng(seed)
    found = []
    for pair in range(count):
        features = rng.uniform(0, 1, len(FEATURES))
        for task in "ab":
            noise = rng.uniform(-0.1, 0.1, 2)
            kept = {FRESH: relation * features[1] + noise[0], TAUGHT: 0.2 + relation * features[1] + noise[1]}
            found.append(Known(f"p{pair}", task, pair < 2, tuple(features), kept))
    return found


def test_a_relation_is_found_and_chance_is_not() -> None:
    found = errors(pairs(10, 0.7), whole_pair=True)
    assert best(found) in (list(FEATURES.values())[1], "all, ridge")
    assert against_mean(found, list(FEATURES.values())[1])[1] < 0.005
    for seed in range(3):
        assert best(errors(pairs(10, 0.0, seed), whole_pair=True)) is None
    assert best(errors(pairs(4, 0.7), whole_pair=True)) is None, "four pairs cannot show it"


def test_nothing_of_the_pair_that_is_left_out_is_read() -> None:
    """Cells of a pair that are alike, and like no other: each predicts the other, and no other pair does."""
    cells = [Known(f"p{n}", task, False, (float(n),) * 4, {FRESH: (-1.0) ** n}) for n in range(4) for task in "ab"]
    assert mean_error(errors(cells, whole_pair=False), "the nearest cell") == 0
    assert mean_error(errors(cells, whole_pair=True), "the nearest cell") == 2
    assert errors(cells[:6], whole_pair=True)["the nearest cell"].keys() == {"p0", "p1", "p2"}
    assert not errors(cells[:4], whole_pair=True)["the nearest cell"], "two other cells are too few"
    unknown = Known("p9", "a", False, (math.nan,) * 4, {FRESH: 0.0})
    assert mean_error(errors([*cells, unknown], whole_pair=True), "all, ridge", ["p9"]) == 0, "unknown: the mean"


def test_what_a_way_kept_of_the_lead(tmp_path: Path) -> None:
    folder = tmp_path / "old--new"
    folder.mkdir()
    moved = {"method": "lorasuite"}
    cells = [
        cell("new", 0, 5.0), cell("old+adapter", 9, 1.0), cell("scratch", 3, 2.0, 0.001),
        cell("scratch", 3, 3.0, 0.003),
        cell("migrated", 0, 21.0, **moved), cell("migrated+lft", 8, 4.0, 0.001, **moved),
        cell("refreshed", 5, 1.5, 0.001, rows=300), cell("refreshed", 5, 0.1, 0.001, rows=1000),
        cell("scratch", 3, 4.0, 0.001, grid="h"), cell("scratch", 3, 0.1, 0.001, rows=30),
        # other ways, each better than the plain one of its arm
        cell("refreshed", 9, 0.2, 0.001, rows=300, settings={"given.labelled": "100"}),
        cell("refreshed", 9, 0.2, 0.001, rows=300, prompts={"sources": ["adapter"], "given": 0}),
        cell("scratch", 9, 0.2, 0.001, settings={"finetune.loraplus_lr_ratio": "16"}),
    ]  # fmt: skip
    for n, one in enumerate(cells):
        (folder / f"{n}.json").write_text(json.dumps(one))
    (found,) = known(tmp_path, tmp_path / "none", tmp_path / "none.json")
    assert (found.pair, found.task, found.real) == ("old--new", "t", True)
    assert found.kept == pytest.approx(
        {
            FRESH: (0.75 + 0.25) / 2,
            "`lorasuite`, no fine-tune": -1.0,
            "`lorasuite`, then 100 labelled rows": 0.25,
            TAUGHT: 0.875,
        }
    )
    assert found.features[-1] == pytest.approx(math.log10(0.2)) and all(map(math.isnan, found.features[:-1]))
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n{BEGIN}\n{END}\nAfter.\n")
    write(tmp_path, page, tmp_path / "outlook.json")
    assert page.read_text().startswith("Before.") and page.read_text().endswith("After.\n")
    shown = json.loads((tmp_path / "outlook.json").read_text())
    assert shown["ways"][0]["way"] == TAUGHT and shown["ways"][0]["real"]["cells"] == 1


def test_the_page_and_what_inspect_shows_are_made_of_the_cells() -> None:
    cells = known(CELLS)
    text = PAGE.read_text(encoding="utf-8")
    assert markdown(cells) in text[text.index(BEGIN) : text.index(END)], "run python -m benchmarks.real tables"
    kept: dict[str, Any] = json.loads(OUTLOOK.read_text(encoding="utf-8"))
    made = outlook(cells)
    assert [row["way"] for row in kept["ways"]] == [row["way"] for row in made["ways"]]
    assert (kept["cells"], kept["predictor"]) == (made["cells"], made["predictor"])
    miniature = [one for one in cells if not one.real]
    assert {one.pair for one in miniature} == {"llama", "neox", "further"}
    assert all(not math.isnan(value) for one in miniature for value in one.features)
