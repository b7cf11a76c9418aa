"""Experiment files: what they come to, everything wrong with one at once, and the tables and figures of results."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorasuite.errors import ConfigError
from lorasuite.planning import ARMS, Experiment, read_experiment
from lorasuite.reporting import Measurement, Score, kept, read_results, write_results

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "experiments").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "name": "small",
    "pair": {"zoo": "llama"},
    "tasks": {"mirror": {"zoo": "mirror", "ready": True}, "own": {"zoo": "mirror", "set": {"retrain.rows": 50}}},
    "seeds": [0, 1],
    "settings": {"finetune": {"epochs": 2}},
    "lora": {"rank": 8},
    "tables": {"main": {"title": "All", "tasks": ["mirror"]}},
}


def read(folder: Path, **changes: Any) -> Experiment:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return read_experiment(path)


def table(**fields: Any) -> dict[str, Any]:
    return {"title": "A table", "tasks": ["own"], **fields}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_files_hold_the_seven_rows_beside_the_paper(path: Path) -> None:
    experiment = read_experiment(path)
    main = experiment.config.tables["main"]
    assert experiment.config.name == path.stem
    assert main.arms == ARMS and len(main.paper) == 2
    assert {"new", "migrated", "scratch", "migrated+lft", "retrained"} == set(main.paper[0].values)
    for name in ("main", "layers", "heads", "cost"):
        assert any(cell.table == name for cell in experiment.cells)


def test_the_six_pairs_of_the_paper_are_there() -> None:
    known = {model["hub"] for model in yaml.safe_load((ROOT / "tests/real_pairs.yaml").read_text())["models"].values()}
    pairs = [read_experiment(path).config.pair for path in FILES if not path.stem.startswith("zoo")]
    bases = [base for pair in pairs for base in (pair.old_base, pair.new_base)]
    assert len(pairs) == 6 and len(set(bases)) == 12 and set(bases) <= known
    kinds = {
        factor
        for path in FILES
        if not path.stem.startswith("zoo")
        for spec in read_experiment(path).config.tables.values()
        for factor in spec.factors
    }
    assert kinds == {
        "lora.rank", "finetune.learning_rate", "finetune_samples", "pair.layer_strategy", "pair.similarity",
        "pair.head_matching", "lora.targets", "lora.kind", "method",
    }  # fmt: skip


def test_only_the_fine_tuned_arms_are_repeated_with_every_seed(tmp_path: Path) -> None:
    cells = read(tmp_path).cells
    assert Counter(cell.arm for cell in cells) == {arm: 2 if arm in ("scratch", "migrated+lft") else 1 for arm in ARMS}
    assert {cell.settings.migration.seed for cell in cells if cell.arm == "scratch"} == {0, 1}
    assert {cell.settings.migration.finetune.seed for cell in cells if cell.arm == "scratch"} == {0, 1}
    # the sequential fit reads the rows that the seed draws, and so does the teacher
    joint = read(tmp_path, tables={"t": table(set={"method": "sequential"}, arms=["migrated", "migrated+lft"])}).cells
    assert [(cell.arm, cell.seed) for cell in joint] == [(a, s) for s in (0, 1) for a in ("migrated", "migrated+lft")]
    written = read(tmp_path, tables={"t": table(set={"teacher_samples": 50}, arms=["retrained", "refreshed"])}).cells
    assert [cell.arm for cell in written] == ["retrained", "refreshed", "refreshed"]


def test_factors_go_over_the_table_over_the_task_over_the_file(tmp_path: Path) -> None:
    grid = table(
        set={"finetune.learning_rate": 0.5, "retrain.rows": 60},
        factors={"lora.targets": [["q", "v"], ["o"]], "finetune.learning_rate": [0.1, 0.2]},
        arms=["scratch"],
    )
    cells = read(tmp_path, tables={"grid": grid}, seeds=[3]).cells
    found = [
        (
            c.level,
            c.settings.lora.targets,
            c.settings.migration.finetune.learning_rate,
            c.settings.migration.finetune.epochs,
            c.settings.retrain.rows,
        )
        for c in cells
    ]
    assert [row[1:] for row in found] == [
        (("q", "v"), 0.1, 2, 60),
        (("q", "v"), 0.2, 2, 60),
        (("o",), 0.1, 2, 60),
        (("o",), 0.2, 2, 60),
    ]
    assert found[1][0] == (("lora.targets", "q,v"), ("finetune.learning_rate", "0.2"))
    alone = read(tmp_path, tables={"plain": table(arms=["scratch"])}).cells[0]
    assert alone.settings.retrain.rows == 50, "the task's own"
    assert alone.settings.migration.method == "lorasuite"
    assert alone.settings.retrain.finetune.learning_rate == 3e-4 and alone.settings.rank == 8


def test_every_problem_of_a_file_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(
            tmp_path,
            pair={"zoo": "lama"},
            tasks={"mirror": {"zoo": "miror"}, "own": {"train_data": "x.jsonl", "ready": True, "adapter": "a"}},
            tables={
                "main": table(tasks=["mirror", "mine"]),
                "cost": table(tasks=["own"], kind="cost", factors={"lora.rank": []}),
            },
        )
    told = [f"{problem.where.split('yaml: ')[1]} {problem.what}" for problem in caught.value.problems]
    assert told == [
        "pair.zoo no pair 'lama'",
        "tasks.own.ready is for miniature tasks",
        "tasks.own has nothing to measure by",
        "tables.main.tasks no task 'mine'",
        "tables.cost.factors.lora.rank has no levels",
        "tables.cost sets lora.rank, and the adapters of own are not trained here",
        "tables.cost.factors are not for a table of costs",
        "tables.cost compares costs, and those of own were paid elsewhere",
    ]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"settings": {"finetune": {"epoch": 3}}}, "Did you mean 'epochs'?"),
        ({"settings": {"method": "auto"}}, "auto may take another method in each cell"),
        ({"settings": {"method": "sequential"}, "lora": {"kind": "dora"}}, "a DoRA has magnitudes"),
        ({"settings": {"finetune": {"distillation": 0.5}}}, "no arm reads rows that the teacher wrote"),
        ({"tables": {"t": table(arms=["refreshed"])}}, "teacher_samples: is 0"),
        (
            {
                "tables": {"t": table(arms=["refreshed"])},
                "settings": {"teacher_samples": 8, "learning_rates": [0.1, 0.2]},
            },
            "there are only 8",
        ),
        (
            {"tables": {"t": table(arms=["refreshed"], set={"lora.kind": "adalora", "teacher_samples": 50})}},
            "how many rows the teacher keeps",
        ),
        ({"settings": {"seed": 3, "output": "x"}}, "seed: is no setting of an experiment"),
        ({"settings": {"finetune_samples": 0}}, "finetune_samples: is 0, and there are arms that read them"),
        ({"lora": {"targets": ["query"]}}, "Input should be 'q'"),
        (
            {"tables": {"t": table(arms=["scratch-own"])}},
            "Input should be 'old', .* or 'refreshed' (got 'scratch-own')",
        ),
        ({"tables": {"t": table(factors={"pair.layers": [1]})}}, "pair.layers: unknown setting"),
        ({"tables": {"t": table(factors={"method": ["lorasuit"]})}}, "Did you mean 'lorasuite'?"),
        ({"tables": {"t": table(colour="red")}}, "unknown setting"),
        ({"tables": {"t": table(tasks=["mirror"], factors={"lora.rank": [2]})}}, "are not trained here"),
    ],
)
def test_a_mistake_says_what_to_do(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + re.sub(r"([?()])", r"\\\1", told)):
        read(tmp_path, **changes)


def test_the_example_of_the_manual_is_a_valid_file(tmp_path: Path) -> None:
    text = (ROOT / "docs/experiments.md").read_text()
    (tmp_path / "mine.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    experiment = read_experiment(tmp_path / "mine.yaml")
    assert {cell.settings.migration.finetune_samples for cell in experiment.cells} == {100, 400}


def measured(arm: str, value: float, seed: int = 0, **fields: Any) -> Measurement:
    score = Score(value=value, stderr=0.02, n=100)
    content = {"table": "main", "task": "own", "metric": "exact_match", "loss": 1.25, **fields}
    return Measurement(arm=arm, seed=seed, scores={"own": score}, **content)


def test_tables_in_the_shape_of_the_paper(tmp_path: Path) -> None:
    tables = {
        "main": table(arms=["new", "scratch"], paper=[{"label": "math", "values": {"new": 16.07}}], note="A note."),
        "rank": table(factors={"lora.rank": [2, 16]}, arms=["scratch"]),
        "kinds": table(factors={"lora.kind": ["lora", "dora"]}, arms=["scratch"], figure="loss"),
        "cost": table(kind="cost", arms=["migrated+lft", "retrained"]),
    }
    experiment = read(tmp_path, tables=tables)
    found = {
        "main": [measured("new", 0.1), measured("scratch", 0.4), measured("scratch", 0.6, seed=1)],
        "rank": [measured("scratch", n / 20, level={"lora.rank": str(n)}, table="rank") for n in (2, 16)],
        "kinds": [
            measured("scratch", 0.5, level={"lora.kind": "lora"}, table="kinds"),
            Measurement(table="kinds", arm="scratch", task="own", seed=0, level={"lora.kind": "dora"}, failed="NaN"),
        ],
        "cost": [
            measured("migrated+lft", 0.5, table="cost", cost={"pair": 9, "transform": 1, "finetune": 4}),
            measured("retrained", 0.6, table="cost", cost={"finetune": 20.0}, peak_memory_bytes=3 * 2**30),
        ],
    }
    written = write_results(experiment, found, tmp_path / "out")
    assert written["main"]["columns"] == ["", "own", "own, loss", "paper: math"]
    assert written["main"]["rows"] == [
        ["new base", "10.0 ± 2.0", "1.250", "16.07"],
        ["LoRA (small)", "50.0 ± 2.0 [40.0, 60.0]", "1.250", "–"],
    ]
    assert written["rank"]["rows"] == [["2", "10.0 ± 2.0", "1.250"], ["16", "80.0 ± 2.0", "1.250"]]
    assert written["kinds"]["rows"][1] == ["dora", "diverged", "–"]
    assert written["cost"]["rows"][0][1:6] == ["9.0", "1.0", "4.0", "5.0", "75.0 %"]
    text = (tmp_path / "out/results.md").read_text()
    assert "| new base | 10.0 ± 2.0 | 1.250 | 16.07 |" in text and "A note." in text and "of 2 seeds" in text
    for name in tables:
        assert (tmp_path / f"out/figures/{name}.png").read_bytes().startswith(b"\x89PNG"), name
    rows = list(csv.DictReader((tmp_path / "out/results.csv").open()))
    assert len(rows) == 9 and rows[1]["value"] == "0.4" and rows[4]["lora.rank"] == "16" and rows[6]["failed"] == "NaN"
    assert json.loads((tmp_path / "out/results.json").read_text())["pair"] == "zoo llama"


def test_earlier_tables_stay_while_the_file_would_give_them_again(tmp_path: Path) -> None:
    tables = {"main": table(arms=["new"]), "rank": table(arms=["new"])}
    experiment = read(tmp_path, tables=tables)
    found = {name: [measured("new", 0.1, table=name)] for name in tables}
    write_results(experiment, found, tmp_path / "out")
    name, before = read_results(tmp_path / "out")
    assert name == "small" and kept(experiment, before) == found
    tables["rank"]["seeds"] = [7]
    assert set(kept(read(tmp_path, tables=tables), before)) == {"main"}
    assert kept(read(tmp_path, tables=tables, lora={"rank": 4}), before) == {}


def test_scores_of_several_lm_eval_tasks_are_averaged(tmp_path: Path) -> None:
    scores = {"addsub": Score(value=0.2, stderr=0.03, n=9), "svamp": Score(value=0.6, stderr=0.04, n=9)}
    cell = Measurement(table="main", arm="new", task="own", seed=0, metric="acc", scores=scores)
    assert cell.score == pytest.approx(0.4) and cell.stderr == pytest.approx(0.025)
    experiment = read(tmp_path, tables={"main": table(arms=["new"], figure="none")})
    made = write_results(experiment, {"main": [cell]}, tmp_path / "out")["main"]
    assert made["columns"] == ["", "addsub", "svamp", "own, mean"] and made["figure"] is None
    assert made["rows"] == [["new base", "20.0 ± 3.0", "60.0 ± 4.0", "40.0 ± 2.5"]]
