"""The whole main path on tiny random bases: stages, cache, output directory, command line."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner

from artifacts import Store, leases
from flows.command_line import app
from flows.migrate_adapter import migrate_adapter
from lorasuite.adapters import Adapter, check_loads, without_old_names
from lorasuite.bases import Checkpoint, _cache, load_model, release_models
from lorasuite.data import Row, whole_text
from lorasuite.errors import ConfigError, PreflightError
from lorasuite.planning import MigrationConfig, build, check
from lorasuite.training import _sweep
from lorasuite.transforms import transform
from tests import models

EVAL_DIR = Path(__file__).parents[1] / "data" / "eval_tasks"
PAIR_STAGES = {"vocabulary", "transfer_matrices", "activations", "similarity", "layer_mapping", "head_mapping"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh artifact store."""
    monkeypatch.setenv("LORASUITE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two Llama bases in which all six factors change, with other ids for the same words."""
    root = tmp_path_factory.mktemp("pair")
    shuffled = [models.words(96)[0], *reversed(models.words(120)[1:])]
    old = models.build(root / "old", "llama", seed=1)
    new = models.build(
        root / "new",
        "llama",
        seed=2,
        vocab=120,
        hidden=48,
        intermediate=64,
        layers=4,
        heads=6,
        kv_heads=2,
        tokens=shuffled,
    )
    return old, new


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Calibration texts, training rows and held-out rows."""
    root = tmp_path_factory.mktemp("data")

    def write(name: str, rows: list[dict[str, str]]) -> Path:
        path = root / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def sentence(n: int, length: int) -> str:
        return " ".join(f"w{(n * 7 + k * k) % 90}" for k in range(length))

    return {
        "texts": write("texts", [{"text": sentence(n, 6 + n % 5)} for n in range(24)]),
        "other": write("other", [{"text": sentence(n, 5 + n % 3)} for n in range(100, 124)]),
        "train": write("train", [{"prompt": sentence(n, 4), "completion": f" w{n} w{n + 1}"} for n in range(24)]),
        "test": write("test", [{"prompt": sentence(n, 4), "completion": f" w{n} w{n + 1}"} for n in range(40, 46)]),
    }


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, pair: tuple[Path, Path]) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return (
        models.build_adapter(root / "first", pair[0], seed=1),
        models.build_adapter(root / "second", pair[0], seed=2),
    )


Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def settings(tmp_path: Path, pair: tuple[Path, Path], data: dict[str, Path], adapters: tuple[Path, Path]) -> Settings:
    def make(**changes: Any) -> dict[str, Any]:
        return {
            "adapter": str(adapters[0]),
            "old_base": str(pair[0]),
            "new_base": str(pair[1]),
            "output": str(tmp_path / "out"),
            "calibration": str(data["texts"]),
            "method": "lorasuite",
        } | changes

    return make


def states(record: dict[str, Any]) -> dict[str, bool]:
    """Stage (and label) → whether it was cached."""
    return {f"{row['stage']} {row['label'] or ''}".strip(): row["cached"] for row in record["timings"]}


@pytest.mark.filterwarnings("error:.*will be removed in v6:FutureWarning")  # of PEFT's calls
def test_whole_migration(home: Path, settings: Settings, pair: tuple[Path, Path], data: dict[str, Path]) -> None:
    record = migrate_adapter(
        settings(
            train_data=str(data["train"]),
            eval_data=str(data["test"]),
            finetune_samples=16,
            finetune={"epochs": 1, "batch_size": 8},
            evaluation={"max_new_tokens": 4},
            learning_rates=[1e-3, 1e-2],
        )
    )
    out = Path(record["output"])
    assert set(record["evaluation"]) == {"old", "old+adapter", "new", "migrated", "scratch", "migrated+lft"}
    kept = json.loads((out / "migration.json").read_text())
    assert set(kept) >= {
        "old_base", "new_base", "adapter", "method", "layer_map", "head_map", "transfer_matrix", "dropped", "finetune",
        "evaluation", "timings", "peak_memory_bytes", "versions", "seed", "algorithm_version",
    }  # fmt: skip
    assert kept["new_base"]["fingerprint"] != kept["old_base"]["fingerprint"]
    layers = {int(o): n for o, n in kept["layer_map"].items()}
    assert sorted(layers) == [0, 1, 2] and list(layers.values()) == sorted(set(layers.values()))
    for o, n in layers.items():
        heads = kept["head_map"][f"{o}->{n}"]
        assert sorted(map(int, heads)) == [0, 1, 2, 3] and len(set(heads.values())) == 4
    assert not kept["transfer_matrix"]["identity"] and 0 < kept["transfer_matrix"]["residual"] <= 1
    assert kept["finetune"]["steps"] == 3 and len(kept["finetune"]["losses"]) == 3
    assert kept["finetune"]["rehearsed"] == kept["control"]["rehearsed"] > 0
    assert {entry["learning_rate"] for entry in kept["finetune"]["sweep"]} == {1e-3, 1e-2}
    assert kept["loaded_bytes_peak"] > 0
    check_loads(out, pair[1])
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(pair[1])
    base = models.load(pair[1])
    ids = torch.arange(4, 20)[None]
    bare = base(ids).logits
    with without_old_names():
        assert (PeftModel.from_pretrained(base, str(out))(ids).logits - bare).abs().max() > 1e-4
    html = (out / "report.html").read_text()
    assert "migrated + LFT" in html and html.count('role="img"') == 3 and "://" not in html
    assert {name: served["ok"] for name, served in kept["serving"].items()} == dict.fromkeys(
        ("peft", "transformers", "vllm", "llama.cpp"), True
    )
    assert {(one["first"], one["second"]) for one in kept["comparisons"]} == {
        (arm, "migrated+lft") for arm in ("old+adapter", "new", "scratch")
    }
    assert len((out / "samples" / "migrated.jsonl").read_text().splitlines()) == 6
    assert not [p for p in out.parent.iterdir() if p.name.startswith(".out")]


def test_published_adapter_is_the_reported_update(home: Path, settings: Settings, pair: tuple[Path, Path]) -> None:
    record = migrate_adapter(settings())
    adapter = Adapter.open(record["output"])
    merged = PeftModel.from_pretrained(models.load(pair[1]), record["output"]).merge_and_unload()
    new = Checkpoint(pair[1])
    weights = dict(merged.named_parameters())
    assert set(record["updates"]) == set(adapter.modules)
    for module in adapter.modules:
        update = adapter.update(module)
        assert update.norm() == pytest.approx(record["updates"][module], rel=1e-5)
        expected = new.tensor(module + ".weight").double() + update.dense()
        torch.testing.assert_close(weights[module + ".weight"].double(), expected, rtol=1e-5, atol=1e-5)


def test_second_adapter_reuses_every_pair_stage(home: Path, settings: Settings, adapters: Any, tmp_path: Path) -> None:
    migrate_adapter(settings())
    second = states(migrate_adapter(settings(adapter=str(adapters[1]), output=str(tmp_path / "second"))))
    assert not second.pop("transform") and not second.pop("serving")
    assert all(second.values()) and {name.split()[0] for name in second} == PAIR_STAGES | {"mlp_factors"}


def test_other_texts_recompute_exactly_what_reads_them(
    home: Path, settings: Settings, data: dict[str, Path], tmp_path: Path
) -> None:
    migrate_adapter(settings())
    again = states(migrate_adapter(settings(calibration=str(data["other"]), output=str(tmp_path / "b"))))
    assert {name for name, cached in again.items() if cached} >= {
        "vocabulary", "transfer_matrices", "mlp_factors gate", "mlp_factors up", "mlp_factors down",
    }  # fmt: skip
    assert not any(again[name] for name in ("activations old", "activations new", "similarity", "layer_mapping"))


def test_refresh_recomputes_only_that_stage(home: Path, settings: Settings, tmp_path: Path) -> None:
    migrate_adapter(settings())
    again = states(migrate_adapter(settings(output=str(tmp_path / "b")), refresh=("similarity",)))
    assert [name for name, cached in again.items() if not cached] == ["similarity"]
    with pytest.raises(ConfigError, match="Did you mean"):
        migrate_adapter(settings(output=str(tmp_path / "c")), refresh=("similarty",))


def test_damaged_artifact_is_recomputed(home: Path, settings: Settings, tmp_path: Path) -> None:
    first = migrate_adapter(settings())
    key = next(row["key"] for row in first["timings"] if row["stage"] == "similarity")
    file = Store(home).path(key) / "data.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    again = migrate_adapter(settings(output=str(tmp_path / "b")))
    assert [name for name, cached in states(again).items() if not cached] == ["similarity"]
    a, b = (Path(r["output"]) / "adapter_model.safetensors" for r in (first, again))
    assert a.read_bytes() == b.read_bytes()


def test_auto_chooses_by_held_out_loss(home: Path, settings: Settings, data: dict[str, Path]) -> None:
    rows = {"train_data": str(data["train"]), "eval_data": str(data["test"]), "finetune_samples": 20}
    rows["candidates"] = ["all"]
    record = migrate_adapter(
        settings(**rows, method="auto", finetune={"epochs": 1}, evaluation={"generate": False, "max_new_tokens": 4})
    )
    tried = record["candidates"]
    assert {"none", "lorasuite", "procrustes", "functional"} <= {entry["method"] for entry in tried}
    assert "copy" not in {entry["method"] for entry in tried}  # shapes differ
    losses = [entry["loss"] for entry in tried]
    assert losses == sorted(losses) and record["method"] == tried[0]["method"]
    assert ("migrated" in record["evaluation"]) == (record["method"] != "none")
    assert "sequential" in {entry["method"] for entry in tried}


def test_auto_tries_what_may_start_a_finetune_and_no_control(
    plugins: None, home: Path, settings: Settings, data: dict[str, Path]
) -> None:
    """Low in loss untrained, and no start of a fine-tune: only tried where there is none; a control never is."""
    rows = {"train_data": str(data["train"]), "finetune_samples": 20, "finetune": {"epochs": 1}}
    record = migrate_adapter(settings(**rows, method="auto", candidates=["all"]))
    tried = {entry["method"] for entry in record["candidates"]}
    assert "functional-ridge" in tried and not {"logits", "random", "target-mean"} & tried


def test_a_sweep_chooses_by_rows_that_no_transform_was_fitted_on(
    home: Path, settings: Settings, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the seed of the fine-tune is: the rows are split once, by the migration's."""
    kind = type(transform("sequential"))
    whole = kind.fit
    fitted: list[str] = []
    chosen_by: list[str] = []

    class Enough(Exception):
        pass

    def fit(self: Any, *given: Any, texts: list[str], **named: Any) -> Any:
        fitted.extend(texts)
        return whole(self, *given, texts=texts, **named)

    def tune(*_: Any, validation_rows: list[Row], **__: Any) -> Any:
        chosen_by.extend(whole_text(row) for row in validation_rows)
        raise Enough

    monkeypatch.setattr(kind, "fit", fit)
    monkeypatch.setattr(_sweep, "finetune", tune)
    rows = {"train_data": str(data["train"]), "finetune_samples": 20, "teacher_samples": 0, "controls": False}
    with pytest.raises(Enough):
        migrate_adapter(settings(**rows, method="sequential", learning_rates=[1e-3, 1e-2], finetune={"seed": 7}))
    assert len(fitted) == 16 and len(chosen_by) == 4 and not set(fitted) & set(chosen_by)


def test_auto_needs_no_data_of_the_user(home: Path, settings: Settings, pair: tuple[Path, Path]) -> None:
    """Told to train on nothing, what the old base with the adapter writes is what candidates are scored by."""
    made = {"teacher": {"max_new_tokens": 8}, "teacher_samples": 0}
    record = migrate_adapter(settings(method="auto", **made))
    assert {"none", "sequential", "lorasuite"} <= {entry["method"] for entry in record["candidates"]}
    assert record["finetune"] is None and "teacher" in states(record)
    check_loads(Path(record["output"]), pair[1])
    fitted = migrate_adapter(settings(method="sequential", output=f"{record['output']}-2", **made))
    assert fitted["method"] == "sequential" and states(fitted)["teacher"] and fitted["fit_residual"]
    check_loads(Path(fitted["output"]), pair[1])


def test_auto_tries_what_it_is_told_to_try(
    home: Path, settings: Settings, pair: tuple[Path, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    """Of itself what fits of ``copy`` alone, a fresh LoRA here, and no stage that only other transforms read."""
    rows = {"train_data": str(data["train"]), "finetune": {"epochs": 1}, "method": "auto"}
    record = migrate_adapter(settings(**rows))
    asked = migrate_adapter(settings(candidates=["none"], **rows, output=str(tmp_path / "asked")))
    assert all(states(asked).values()), "the same stages"
    ran = {stage.split()[0] for stage in states(record)}
    assert {"head_mapping", "search", "serving"} <= ran
    assert ran.isdisjoint({"alignment", "state_map", "mlp_factors", "transform", "model_fit"})
    assert [one["method"] for one in record["candidates"]] == ["none"] and record["finetune"]["start"] == "fresh"
    card = (Path(record["output"]) / "README.md").read_text()
    assert "No transform was tried: a new LoRA trained on" in card
    check_loads(Path(record["output"]), pair[1])
    some = migrate_adapter(settings(candidates=["procrustes"], **rows, output=str(tmp_path / "some")))
    assert {one["method"] for one in some["candidates"]} == {"none", "procrustes"}
    fresh, moved = Adapter.open(record["output"]), Adapter.open(tmp_path / "some")
    assert set(fresh.modules) >= set(moved.modules) and fresh.rank == moved.rank
    for wrong, what in (({"candidates": ["procrust"]}, "procrustes"), ({"method": "copy"}, "what --method auto tries")):
        with pytest.raises(ConfigError, match=what):
            migrate_adapter(settings(**{**rows, "candidates": ["none"], **wrong}))
    with pytest.raises(PreflightError, match="no rows to train"):
        migrate_adapter(settings(candidates=["none"], teacher_samples=0, method="auto", output=str(tmp_path / "none")))


def test_a_fit_of_some_modules_only(plugins: None, home: Path, settings: Settings, pair: tuple[Path, Path]) -> None:
    made = {"teacher": {"max_new_tokens": 8}, "teacher_samples": 0}
    record = migrate_adapter(settings(method="auto", **made))
    assert "logits" in {entry["method"] for entry in record["candidates"]}  # nothing is fine-tuned here
    last = migrate_adapter(settings(method="logits", output=f"{record['output']}-3", **made))
    assert last["method"] == "logits" and len(last["fit_residual"]) == 2
    # the last block is fitted; what else the adapter updates starts from nothing, for a fine-tune to use
    assert set(last["fresh"]).isdisjoint(last["fit_residual"]) and last["fresh"]
    check_loads(Path(last["output"]), pair[1])


@pytest.mark.parametrize("method", ["procrustes", "functional"])
def test_aligned_methods(
    plugins: None, home: Path, settings: Settings, pair: tuple[Path, Path], method: str, tmp_path: Path
) -> None:
    record = migrate_adapter(settings(method=method))
    check_loads(Path(record["output"]), pair[1])
    assert "mlp_factors gate" not in states(record)
    again = states(migrate_adapter(settings(method="functional-ridge", output=str(tmp_path / "b"))))
    assert again["alignment maps"] and not again["alignment functional-ridge"] and not again["transform"]
    with pytest.raises(PreflightError, match="Give --calibration"):
        migrate_adapter(settings(method=method, calibration=None, output=str(tmp_path / "c")))


def test_problems_come_at_once_and_nothing_is_written(home: Path, settings: Settings, tmp_path: Path) -> None:
    bad = tmp_path / "rows.jsonl"
    bad.write_text('{"prompt": "w1"}\n{"completion": 3}\n')
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(PreflightError) as caught:
        migrate_adapter(settings(train_data=str(bad), eval_data=str(tmp_path / "nowhere.jsonl"), calibration=None))
    text = str(caught.value)
    assert len(caught.value.problems) >= 4
    assert "exists already" in text and "nowhere.jsonl" in text and "rows.jsonl" in text
    assert not list(out.iterdir()) and not (home / "objects").exists()


def test_failed_publication_leaves_nothing(
    home: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("lorasuite.reporting._publication.write_report", broken)
        with pytest.raises(OSError, match="no space"):
            migrate_adapter(settings())
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    assert all(states(migrate_adapter(settings())).values())


def test_equal_depth_needs_no_texts(home: Path, tmp_path: Path, pair: tuple[Path, Path], settings: Settings) -> None:
    new = models.build(tmp_path / "wide", "llama", seed=3, hidden=48, heads=6)
    record = migrate_adapter(settings(new_base=str(new), calibration=None))
    assert record["layer_map"] == {"0": 0, "1": 1, "2": 2}
    assert record["notices"] and "similarity" not in states(record)


def test_lm_eval_tasks_by_name(home: Path, settings: Settings, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rows.json").write_text(json.dumps([{"q": f"w{n}", "a": n % 2} for n in range(6)]))
    (tasks / "choice.yaml").write_text(
        f"""
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tasks / "rows.json"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["w1", "w2"]
doc_to_target: "{{{{a}}}}"
metric_list: [{{metric: acc}}]
"""
    )
    record = migrate_adapter(settings(eval_tasks=["local_choice"], include_path=str(tasks)))
    assert set(record["tasks"]) == {"old", "old+adapter", "new", "migrated"} and record["evaluation"] == {}
    score = record["tasks"]["migrated"]["local_choice"]
    assert score["n"] == 6 and 0 <= score["metrics"]["acc,none"] <= 1
    assert "local_choice<small>acc</small>" in (Path(record["output"]) / "report.html").read_text()
    found = {(row["first"], row["second"], row["task"]): row for row in record["comparisons"]}
    assert set(found) == {(arm, "migrated", "local_choice") for arm in ("old+adapter", "new")}
    row = found["new", "migrated", "local_choice"]
    scores = [record["tasks"][arm]["local_choice"]["metrics"]["acc,none"] for arm in ("new", "migrated")]
    assert (row["metric"], row["n"], [row["first_score"], row["second_score"]]) == ("acc,none", 6, scores)
    assert row["difference"] == pytest.approx((len(row["positive_flips"]) - len(row["negative_flips"])) / 6)
    assert len((Path(record["output"]) / "samples/migrated/local_choice.jsonl").read_text().splitlines()) == 6

    # the paper's tasks, each cached by itself
    both = ["lorasuite_boolq", "lorasuite_aqua"]
    again = migrate_adapter(
        settings(eval_tasks=both, eval_dir=str(EVAL_DIR), evaluation={"limit": 2}, output=str(tmp_path / "out2"))
    )
    assert set(again["tasks"]["migrated"]) == set(both)
    third = migrate_adapter(
        settings(eval_tasks=both[:1], eval_dir=str(EVAL_DIR), evaluation={"limit": 2}, output=str(tmp_path / "out3"))
    )
    assert all(states(third).values())


def test_general_ability(
    home: Path, settings: Settings, data: dict[str, Path], adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    asked = {
        "general_texts": str(data["other"]), "general_task": "lorasuite_boolq", "eval_dir": str(EVAL_DIR),
        "general": {"samples": 5, "documents": 2}, "gate": {"max_general_loss": -9.0},
    }  # fmt: skip
    record = migrate_adapter(settings(**asked))
    general = record["general"]
    assert set(general["text"]) == set(general["tasks"]) == {"old", "old+adapter", "new", "migrated"}
    assert general["source"] == "5 texts of general_texts" and general["missing"] == []
    text, task = general["costs"]
    assert (text["task"], text["n"], task["task"], task["n"]) == (None, 5, "lorasuite_boolq", 2)
    bits = {arm: scores["bits_per_byte"] for arm, scores in general["text"].items()}
    assert text["old"] == pytest.approx(bits["old+adapter"] - bits["old"]) and text["old"] != 0
    assert text["excess"] == pytest.approx(bits["migrated"] - bits["new"] - text["old"])
    last = record["verdict"]["checks"][0]
    assert last["threshold"] == -9 and not last["passed"], "no held-out rows: general ability alone was checked"
    out = Path(record["output"])
    assert "general text, bits per byte" in (out / "report.html").read_text()
    assert "general text, bits per byte" in (out / "README.md").read_text()

    # the bare bases were measured once for every adapter
    other = migrate_adapter(settings(**asked, adapter=str(adapters[1]), output=str(tmp_path / "out2")))
    cached = {(row["stage"], row["label"]): row["cached"] for row in other["timings"] if row["stage"] == "general_text"}
    assert {label: found for (_, label), found in cached.items()} == {
        "old": True, "new": True, "old+adapter": False, "migrated": False,
    }  # fmt: skip


def test_general_texts_are_texts_that_nothing_reads(
    home: Path, settings: Settings, data: dict[str, Path], tmp_path: Path
) -> None:
    def planned(**changes: Any) -> Any:
        return check(build(MigrationConfig, settings(**changes)))

    plan = planned()
    assert plan.general.texts == [] and "there are 0 calibration texts beyond" in plan.general.missing
    assert any("general ability is not measured: general_texts is not set" in note for note in plan.inspection.notices)
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"text": f"w{n} w{n % 7} w{n % 5} {n}"}) + "\n" for n in range(50)))
    plan = planned(calibration=str(many), pair={"calibration_samples": 20, "cka_batch": 8})
    assert plan.general.source == "30 calibration texts beyond the 20 that are read"
    assert not set(plan.general.texts) & set(plan.texts)
    assert any(plan.general.source in note for note in plan.inspection.notices), "no silent choice"
    short = planned(calibration=str(many), pair={"calibration_samples": 21, "cka_batch": 8})
    assert short.general.texts == [], "29 tell too little to be taken unasked"
    taught = planned(
        calibration=str(many), pair={"calibration_samples": 20, "cka_batch": 8}, teacher_samples=4, method="auto"
    )
    assert taught.general.texts == [] and "the teacher answers beginnings" in taught.general.missing
    trained = planned(calibration=None, train_data=str(data["train"]))
    assert "there are no calibration texts beside the training data" in trained.general.missing

    both = tmp_path / "both.jsonl"
    # two of the others are calibration texts too
    both.write_text(data["texts"].read_text() + data["other"].read_text())
    plan = planned(general_texts=str(both))
    assert len(plan.general.texts) == 22 and not set(plan.general.texts) & set(plan.texts)
    assert any(note.startswith("general texts: 24 left out") for note in plan.inspection.notices)
    with pytest.raises(PreflightError) as caught:
        planned(general_texts=str(data["texts"]), general_task="no_such_task")
    assert {problem.what.split(" (")[0] for problem in caught.value.problems} == {
        "has no text that is not read for calibration, trained on or answered", "is not known to lm-eval",
    }  # fmt: skip


@pytest.mark.parametrize("strategy, expected", [("first", [0, 1, 2]), ("last", [1, 2, 3])])
def test_strategies_without_texts(home: Path, settings: Settings, strategy: str, expected: list[int]) -> None:
    record = migrate_adapter(settings(calibration=None, pair={"layer_strategy": strategy}))
    assert list(record["layer_map"].values()) == expected


def test_unmapped_layers_get_a_fresh_lora(home: Path, settings: Settings, pair: tuple[Path, Path]) -> None:
    record = migrate_adapter(settings(unmapped="train", output_type="adalora"))
    assert Adapter.open(record["output"]).kind == "ADALORA"
    free = set(range(4)) - set(record["layer_map"].values())
    assert {int(path.split(".")[2]) for path in record["fresh"]} == free
    check_loads(Path(record["output"]), pair[1])


def test_rank_and_scale(home: Path, settings: Settings) -> None:
    record = migrate_adapter(settings(rank=6))
    adapter = Adapter.open(record["output"])
    assert adapter.rank == 6 and set(adapter.scaling.values()) == {2.0}
    assert all(kept == pytest.approx(1) for kept in record["retained_energy"].values())


class TestCommandLine:
    """The commands as a user types them."""

    run = staticmethod(lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments]))

    def test_inspect(self, pair: tuple[Path, Path], adapters: tuple[Path, Path], data: dict[str, Path]) -> None:
        bases = ("--old-base", pair[0], "--new-base", pair[1])
        result = self.run("inspect", *bases, "--adapter", adapters[0], "--json")
        assert result.exit_code == 0
        found = json.loads(result.stdout)
        changed = {row["name"] for row in found["factors"] if row["changed"]}
        assert changed >= {"vocabulary size", "hidden size", "intermediate size", "layers", "attention heads"}
        assert {row["role"] for row in found["modules"] if row["moves"]} == {"q", "k", "v", "o", "gate", "up", "down"}
        assert found["vocabulary"]["common"] == 96
        said = self.run("inspect", *bases).stdout
        assert "GQA" in said and found["outlook"] == {} and "measured elsewhere" not in said
        # with texts: what every way did elsewhere, and whether anything tells what it will do here
        texts = ("--calibration", data["texts"])
        outlook = json.loads(self.run("inspect", *bases, *texts, "--json").stdout)["outlook"]
        ways = {row["way"]: row for row in outlook["ways"]}
        fresh = ways["a fresh LoRA on 100 labelled rows"]["all"]
        assert -1 <= fresh["low"] <= fresh["mean"] <= fresh["high"] <= 1 and fresh["cells"] > 1
        said = " ".join(self.run("inspect", *bases, *texts).stdout.split())
        told = outlook["predictor"] or "nothing measured predicts what a way does on another pair or task"
        assert told in said and f"pairs measured: {outlook['pairs']}, cells" in said

    def test_inspect_names_the_wrong_base(self, pair: tuple[Path, Path], adapters: tuple[Path, Path]) -> None:
        bases = ("--old-base", pair[1], "--new-base", pair[0])
        result = self.run("inspect", *bases, "--adapter", adapters[0], "--json")
        assert result.exit_code == 2
        assert "trained on another base" in json.dumps(json.loads(result.stdout)["problems"])

    def test_prepare_then_migrate(self, home: Path, settings: Settings, data: dict[str, Path], tmp_path: Path) -> None:
        s = settings()
        shared = ("--old-base", s["old_base"], "--new-base", s["new_base"], "--calibration", s["calibration"])
        default = self.run("prepare", *shared, "--json")
        assert default.exit_code == 0, default.output
        ran = states(json.loads(default.stdout))
        assert {name.split()[0] for name in ran} == PAIR_STAGES, "what a migration with rows reads, and no more"
        assert not any(ran.values())
        prepared = self.run("prepare", *shared, "--candidates", "all", "--json")
        assert prepared.exit_code == 0, prepared.output
        more = {name.split()[0] for name, cached in states(json.loads(prepared.stdout)).items() if not cached}
        assert more == {"mlp_factors", "alignment", "state_map"}
        config = tmp_path / "c.yaml"
        config.write_text("rank: 4\nmethod: lorasuite\npair: {pooling: mean}\n")
        done = self.run(
            "migrate", *shared, "--adapter", s["adapter"], "--output", s["output"], "--config", config,
            "--rank", "5", "--fail-on", "retrain", "--json",
        )  # fmt: skip
        assert done.exit_code == 1, done.output  # nothing was measured, which no gate lets pass
        record = json.loads(done.stdout)
        assert record["settings"]["rank"] == 5 and record["verdict"]["verdict"] == "unmeasured"
        assert [name for name, cached in states(record).items() if not cached] == ["transform", "serving"]

        listed = json.loads(self.run("artifacts", "ls", "--json").stdout)["artifacts"]
        key = next(row["key"] for row in listed if row["stage"] == "layer_mapping")
        assert json.loads(self.run("artifacts", "show", key[:12], "--json").stdout)["key"] == key
        assert json.loads(self.run("artifacts", "verify", "--json").stdout) == {"checked": len(listed), "damaged": {}}
        gc = ("artifacts", "gc", "--keep-days", "0", "--json")
        assert json.loads(self.run(*gc).stdout)["would_remove"] == [], "this process has opened them"
        leases.give_back()
        assert json.loads(self.run(*gc).stdout)["would_remove"]
        assert len(json.loads(self.run("artifacts", "ls", "--json").stdout)["artifacts"]) == len(listed)
        (Path(s["output"]) / "report.html").unlink()
        assert self.run("report", s["output"], "--json").exit_code == 0
        assert (Path(s["output"]) / "report.html").is_file()

    def test_evaluate(
        self, home: Path, settings: Settings, data: dict[str, Path], adapters: Any, tmp_path: Path, monkeypatch: Any
    ) -> None:
        loads = []
        release_models()
        monkeypatch.setattr(_cache, "load_model", lambda *a, **k: loads.append(a) or load_model(*a, **k))
        arguments = [
            "evaluate", "--base", settings()["old_base"], "--adapter", adapters[0], "--adapter", adapters[1],
            "--eval-data", data["test"], "--max-new-tokens", "4", "--tasks", "lorasuite_boolq,lorasuite_addsub",
            "--eval-dir", EVAL_DIR, "--limit", "3", "--json", "--output",
        ]  # fmt: skip
        result = self.run(*arguments, tmp_path / "one")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert len(loads) == 1  # nine stages
        results = found["results"]
        assert list(results) == ["base", "first", "second"] and results["base"]["loss"] != results["first"]["loss"]
        assert set(found["tasks"]["second"]) == {"lorasuite_boolq", "lorasuite_addsub"}
        pairs = [("base", "first"), ("base", "second"), ("first", "second")]
        # for each pair of arms both tasks, and exact match and bits per byte of the rows
        told = sorted((row["first"], row["second"]) for row in found["comparisons"])
        assert told == sorted(pair for pair in pairs for _ in range(4))
        kept = tmp_path / "one" / "samples"
        assert sorted(str(path.relative_to(kept)) for path in kept.rglob("*.jsonl"))[-3:] == [
            "second.jsonl", "second/lorasuite_addsub.jsonl", "second/lorasuite_boolq.jsonl",
        ]  # fmt: skip
        assert json.loads((tmp_path / "one" / "results.json").read_text())["tasks"] == found["tasks"]
        for arm, task in itertools.product(results, found["tasks"]["base"]):
            lines = [json.loads(line) for line in (kept / arm / f"{task}.jsonl").open()]
            for metric, value in found["tasks"][arm][task]["metrics"].items():
                assert value == pytest.approx(sum(line["scores"][metric] for line in lines) / 3)

        again = json.loads(self.run(*arguments, tmp_path / "two").stdout)
        assert all(states(again).values()) and len(states(again)) == 9 and len(loads) == 1
        assert again["comparisons"] == found["comparisons"]

        result = self.run(*arguments[:-1], "--tasks", "lorasuite_bolq", "--adapter", tmp_path, "--output", tmp_path)
        assert result.exit_code == 2
        message = json.loads(result.stdout)["message"]
        assert "holds no adapter_config.json" in message and "exists already" in message
        assert "Did you mean 'lorasuite_boolq'" in message

    def test_mistakes(self, settings: Settings, tmp_path: Path) -> None:
        s = settings()
        bases = ("--old-base", s["old_base"], "--new-base", s["new_base"], "--adapter", s["adapter"])
        config = tmp_path / "c.yaml"
        config.write_text("pair: {poling: mean}\nmethod: lorasuit\n")
        result = self.run("migrate", *bases, "--config", config, "--json")
        assert result.exit_code == 2
        message = json.loads(result.stdout)["message"]
        assert "Did you mean 'pooling'" in message and "Did you mean 'lorasuite'" in message and "--output" in message
        assert self.run("migrate", *bases, "--output", tmp_path / "o", "--device", "tpu").exit_code == 2
        hub = ("--calibration", s["calibration"], "--push-to-hub", "me/it")
        result = self.run("migrate", *bases, *hub, "--output", tmp_path / "o", "--json")
        assert result.exit_code == 2 and not (tmp_path / "o").exists(), "found before any work"
        assert "nobody on the Hub could load" in json.loads(result.stdout)["message"]
        assert self.run("report", tmp_path, "--json").exit_code == 2
        assert self.run("artifacts", "show", "ffff", "--json").exit_code == 2


def test_json_alone_on_standard_output(home: Path, settings: Settings, prefect_server: str, tmp_path: Path) -> None:
    """A program reads one JSON object; everything else is on standard error."""
    s = settings()
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in s.items()]
    done = subprocess.run(
        [sys.executable, "-c", "from flows.command_line import main; main()", "migrate", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PREFECT_API_URL": prefect_server},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == s["output"]
    assert done.stdout.count("\n") == 1
