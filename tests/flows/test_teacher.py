"""The label-free refresh through the flows: without labels, mixed, cached, refused, and a fleet on one loaded base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from artifacts import Store
from flows.migrate_adapter import migrate_adapter
from flows.migrate_fleet import migrate_fleet
from lorasuite import zoo
from lorasuite.bases import _cache, release_models
from lorasuite.errors import ConfigError, DataError, EngineError, PreflightError, Problem
from lorasuite.planning import _asked
from lorasuite.reporting import OWN_ROWS_START
from lorasuite.training import write_scaled
from tasks import teacher_stages
from tests.flows.small import Small

pytestmark = pytest.mark.usefixtures("home")

TUNE: dict[str, Any] = {"epochs": 1, "batch_size": 8}


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a zoo adapter's migration, with prompts that lack their answers."""
    root = tmp_path_factory.mktemp("mirror")
    pair = zoo.pair("neox")
    prompts = [{"prompt": row["prompt"]} for row in zoo.rows("neox", "mirror", "train", 40)]
    zoo.write_rows(prompts, root / "prompts.jsonl")
    zoo.write_rows(zoo.rows("neox", "mirror", "train", 12, seed=5), root / "train.jsonl")
    zoo.write_rows([{"text": text} for text in zoo.texts("neox", 16)], root / "texts.jsonl")
    return {
        "adapter": str(pair.adapter("mirror")),
        "old_base": str(pair.old),
        "new_base": str(pair.new),
        "calibration": str(root / "texts.jsonl"),
        "prompts": str(root / "prompts.jsonl"),
        "controls": False,
        "method": "procrustes",
        "teacher": {"max_new_tokens": 16},
    } | {"root": root}


def run(given: dict[str, Any], output: Path, **changes: Any) -> dict[str, Any]:
    settings = {name: value for name, value in given.items() if name != "root"}
    return migrate_adapter({**settings, "output": str(output), **changes})


def cached(record: dict[str, Any]) -> dict[str, bool]:
    return {row["stage"]: row["cached"] for row in record["timings"]}


def test_without_labels_then_cached_then_mixed(mirror: dict[str, Any], home: Path, tmp_path: Path) -> None:
    first = run(mirror, tmp_path / "first", teacher_samples=24, finetune={**TUNE, "distillation": 0.5})
    teacher = first["teacher"]
    assert teacher["rows"] == 24 and teacher["temperature"] == 0 and teacher["worth"]
    assert teacher["measured_on"] == "written rows" and teacher["distilled"]["rows"] == 24
    assert first["finetune"]["samples"] == first["finetune"]["distilled"] == 24 and first["finetune"]["steps"] == 4
    assert first["finetune"]["rehearsed"] == 2
    key = next(row["key"] for row in first["timings"] if row["stage"] == "teacher")
    rows = [json.loads(line) for line in Store(home).open(key).file("rows.jsonl").read_text().splitlines()]
    truth = {row["prompt"]: row["completion"] for row in zoo.rows("neox", "mirror", "train", 40)}
    assert sum(truth[row["prompt"]] == row["completion"] for row in rows) >= 22  # the adapter knows its task
    # Answers beside the prompts change nothing: they are not part of the teacher's key.
    labelled = mirror["root"] / "labelled.jsonl"
    zoo.write_rows([{"prompt": prompt, "completion": " a wrong answer"} for prompt in truth], labelled)
    again = run(
        mirror, tmp_path / "again",
        prompts=str(labelled), teacher_samples=24, finetune={**TUNE, "distillation": 0.5},
        teacher={"max_new_tokens": 16, "batch_size": 5},
    )  # fmt: skip
    states = cached(again)
    assert states["teacher"] and states["teacher_worth"] and states["soft_labels"] and states["finetune"]
    tune = {**TUNE, "token_weights": "excess"}
    second = {"second_step": "on-policy", "second_step_epochs": 1, "teacher_samples": 24}
    further = run(mirror, tmp_path / "further", **second, finetune=tune)
    assert cached(further)["rehearsal"] and not cached(further)["finetune"], "texts of the base's own serve every run"
    result = further["finetune"]["second_step"]
    assert result["measured_on"] == "written rows" and result["held_out"] == 5 and result["before"] > 0
    assert result["kept"] is (result["after"] < result["before"])
    assert any(told.startswith("second step (on-policy): ") for told in further["notices"])
    keys = {row["stage"]: row["key"] for row in further["timings"]}
    weights = Store(home).open(keys["token_weights"])
    assert weights.info["rows"] == 24 and float(weights.tensor("weights").std()) > 0
    kept = Store(home).open(keys["second_step"]).file("adapter_model.safetensors").read_bytes()
    assert (tmp_path / "further" / "adapter_model.safetensors").read_bytes() == kept
    with pytest.raises(PreflightError, match=r"second_step.*writes none") as refused:
        run(mirror, tmp_path / "none", second_step="cached", finetune={**tune, "distillation": 0.5}, prompts=None)
    assert "finetune.token_weights" in str(refused.value) and "finetune.distillation" in str(refused.value)
    mixed = run(
        mirror, tmp_path / "mixed",
        teacher_samples=24, train_data=str(mirror["root"] / "train.jsonl"), finetune_samples=12, finetune=TUNE,
    )  # fmt: skip
    assert cached(mixed)["teacher"] and not cached(mixed)["finetune"]
    assert mixed["teacher"]["measured_on"] == "training rows" and mixed["finetune"]["samples"] == 36
    assert mixed["teacher"]["rows"] == 24 and mixed["teacher"]["scored_rows"] == 12
    assert mixed["finetune"]["distilled"] == 0 and mixed["teacher"]["distilled"] is False


def test_auto_makes_the_teacher_earn_its_place(mirror: dict[str, Any], tmp_path: Path) -> None:
    """The old base imitates the user's prompts; a LoRA on the user's rows alone is a start that could win."""
    rows = zoo.rows("neox", "mirror", "train", 50, seed=6)
    zoo.write_rows(rows, tmp_path / "train.jsonl")
    record = run(
        mirror, tmp_path / "out",
        method="auto", starts=1, learning_rates=[3e-3, 1e-2], prompts=None, train_data=str(tmp_path / "train.jsonl"),
        finetune_samples=50, teacher_samples=80, finetune=TUNE, teacher={"max_new_tokens": 16, "imitate": True},
        controls=True, eval_data=str(mirror["root"] / "train.jsonl"), evaluation={"generate": False},
    )  # fmt: skip
    assert {"scratch", "scratch-own", "migrated+lft"} <= record["evaluation"].keys()
    assert ("scratch-own", "migrated+lft") in {(c["first"], c["second"]) for c in record["comparisons"]}
    assert record["teacher"]["prompts"] == 50 and record["teacher"]["imitated"] == 30
    assert record["teacher"]["temperature"] == 0
    starts = record["finetune"]["starts"]
    assert OWN_ROWS_START in starts and starts[record["finetune"]["start"]] == min(starts.values())


def test_prompts_beside_few_rows_are_read_and_chosen_by(mirror: dict[str, Any], tmp_path: Path) -> None:
    """With 0 teacher samples nothing that the teacher writes is trained on; transforms and the choice may read it."""
    own = {"train_data": str(mirror["root"] / "train.jsonl"), "finetune_samples": 12, "teacher_samples": 0}
    record = run(mirror, tmp_path / "out", **own, method="auto", starts=1, learning_rates=[3e-3, 1e-2], finetune=TUNE)
    assert record["teacher"]["rows"] == 40 and record["teacher"]["samples"] == 0
    assert record["finetune"]["samples"] == 12
    assert record["finetune"]["starts"][record["finetune"]["start"]] == min(record["finetune"]["starts"].values())
    alone = run(mirror, tmp_path / "alone", **own, finetune=TUNE)  # a method that reads no texts of the task
    assert alone["teacher"] is None and "teacher" not in cached(alone)


def test_auto_has_the_teacher_write_where_it_is_told_prompts(mirror: dict[str, Any], tmp_path: Path) -> None:
    """Nobody asked for teacher samples, or named a learning rate: a row for each prompt is written and trained on, from
    the start and at the rate that a search of at most two and a half fine-tunes found; the record says so."""
    record = run(mirror, tmp_path / "out", method="auto", finetune=TUNE)
    tuning, search = record["finetune"], record["finetune"]["search"]
    assert {"fresh", search["start"]} <= tuning["starts"].keys() and search["cost"] <= 2.5
    assert (search["arms"][0]["start"], search["arms"][0]["learning_rate"]) == (
        search["start"],
        search["learning_rate"],
    )
    assert tuning["learning_rate"] == search["learning_rate"] in {rate["learning_rate"] for rate in tuning["sweep"]}
    assert record["teacher"]["rows"] == record["finetune"]["samples"] == 40
    assert any("--teacher-samples 0" in notice for notice in record["notices"])


def test_of_more_prompts_more_rows_are_written_and_read_fewer_times(
    mirror: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasuite.planning._policy.DEFAULT_SYNTHETIC_ROWS", 12)
    monkeypatch.setattr("lorasuite.planning._policy.MOST_SYNTHETIC_ROWS", 32)
    given = {"method": "auto", "learning_rates": [3e-3], "finetune": {"batch_size": 8}}
    record = run(mirror, tmp_path / "out", **given)
    assert record["finetune"]["samples"] == 32 and record["finetune"]["steps"] == 5
    assert record["settings"]["finetune"]["epochs"] is None, "what was asked"
    assert [notice for notice in record["notices"] if "fewer times (1 in place of 3)" in notice]
    searched = run(mirror, tmp_path / "searched", **{**given, "learning_rates": []})
    assert searched["finetune"]["steps"] == 5 and searched["finetune"]["search"]["schedule"] == 4


def test_auto_needs_no_texts_where_a_fresh_lora_is_all_that_it_tries(mirror: dict[str, Any], tmp_path: Path) -> None:
    """Four layers and five: nothing says which of them belong together, and nothing that is tried asks."""
    asked = {"calibration": None, "teacher_samples": 12, "learning_rates": [3e-3], "finetune": TUNE}
    record = run(mirror, tmp_path / "out", method="auto", **asked)
    assert record["method"] == "none" and record["finetune"]["samples"] == 12 and record["layer_map"]
    assert any("no calibration texts, and 4 and 5 layers" in notice for notice in record["notices"])
    for named in ({"method": "lorasuite"}, {"candidates": ["lorasuite"]}, {"teacher_samples": 0, "prompts": None}):
        with pytest.raises(PreflightError, match="the depths differ"):
            run(mirror, tmp_path / "named", **{"method": "auto", **asked, **named})


def test_no_row_of_the_users_at_all(mirror: dict[str, Any], tmp_path: Path) -> None:
    """Beginning and end of a prompt are enough: the calibration texts are not taken for prompts."""
    teacher = {"max_new_tokens": 16, "prefix": "mirror :", "suffix": " ="}
    record = run(mirror, tmp_path / "out", prompts=None, teacher_samples=16, finetune=TUNE, teacher=teacher)
    assert record["teacher"]["prompts"] == 0 and record["teacher"]["imitated"] == record["teacher"]["rows"] == 16


def test_a_teacher_not_worth_copying_is_not_copied(mirror: dict[str, Any], tmp_path: Path) -> None:
    """An adapter that hardly changes its base has nothing to teach: its rows are not used, and the record says why."""
    (tmp_path / "weak").mkdir()
    weak = write_scaled(Path(mirror["adapter"]), tmp_path / "weak", 0.01)
    record = run(mirror, tmp_path / "out", adapter=str(weak), teacher_samples=12)
    assert not record["teacher"]["worth"] and "hardly changes" in record["teacher"]["reason"]
    assert record["finetune"] is None and (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_teacher_that_cannot_write_stops_only_who_asked_for_it(mirror: dict[str, Any], tmp_path: Path) -> None:
    """Answers that never end: ``auto`` goes on with the labelled rows; where rows were asked for it is an error."""
    own = {"train_data": str(mirror["root"] / "train.jsonl"), "finetune_samples": 12, "learning_rates": [1e-3]}
    brief = {"method": "auto", "finetune": TUNE, "teacher": {"max_new_tokens": 1}}
    record = run(mirror, tmp_path / "out", **own, **brief)
    assert record["finetune"]["samples"] == 12
    assert not record["teacher"]["worth"] and "can be used" in record["teacher"]["reason"]
    with pytest.raises(DataError, match="can be used"):
        run(mirror, tmp_path / "asked", **own, **brief, teacher_samples=20)


def test_an_engine_that_does_not_start_stops_only_who_named_it(
    mirror: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As vLLM has no LoRA for GPT-NeoX."""

    @contextmanager
    def started(base: Path, *_: Any, **__: Any) -> Iterator[None]:
        raise EngineError(Problem(str(base), "GPTNeoXForCausalLM does not support LoRA yet", "Use transformers."))
        yield

    monkeypatch.setattr(teacher_stages, "chosen", lambda engine, *_: engine != "transformers")
    monkeypatch.setattr(teacher_stages, "VLLMTeacher", SimpleNamespace(started=started))
    monkeypatch.setattr(_asked, "unusable", lambda *_: [])
    record = run(mirror, tmp_path / "out", teacher_samples=12, finetune=TUNE)
    assert record["teacher"]["engine"] == "transformers" and record["teacher"]["rows"] == 12
    assert any("does not support LoRA yet" in one.getMessage() for one in caplog.records)
    with pytest.raises(EngineError, match="does not support LoRA yet"):
        run(mirror, tmp_path / "named", teacher_samples=12, teacher={**mirror["teacher"], "engine": "vllm"})


def test_everything_wrong_is_said_at_once(mirror: dict[str, Any], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "mirror"}]}\n')
    with pytest.raises(PreflightError) as caught:
        run(mirror, tmp_path, prompts=str(bad), teacher_samples=4, finetune_samples=3)
    said = str(caught.value)
    assert "no chat template" in said and "there is no training data" in said and "exists already" in said


def test_a_fleet_shares_the_loaded_old_base(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pair's stages, both adapters' teachers and both migrations read one load of the old base."""
    release_models()
    loaded: list[str] = []
    load = _cache.load_model
    monkeypatch.setattr(_cache, "load_model", lambda path, *rest: loaded.append(Path(path).name) or load(path, *rest))
    written: list[list[str]] = []
    write = teacher_stages.write_rows
    monkeypatch.setattr(
        teacher_stages, "write_rows", lambda *given, **named: written.append(list(loaded)) or write(*given, **named)
    )
    file = small.fleet(
        tmp_path / "fleet.yaml",
        ("one", "two"),
        defaults={
            "calibration": str(small.root / "texts.jsonl"),
            "method": "lorasuite",
            "teacher_samples": 4,
            "finetune": TUNE,
            "teacher": {"max_new_tokens": 8, "min_kept": 0},
        },
    )
    migrate_fleet(str(file))
    assert len(written) == 2 and all("small-old" in before for before in written)
    assert loaded.count("small-old") == 1


def test_a_handful_of_prompts_are_examples_to_write_more_from(mirror: dict[str, Any], tmp_path: Path) -> None:
    """The record says which source gave what share; answers beside the examples change nothing."""
    rows = zoo.rows("neox", "mirror", "train", 5)
    zoo.write_rows([{"prompt": row["prompt"]} for row in rows], tmp_path / "five.jsonl")
    zoo.write_rows([{**row, "completion": " wrong"} for row in rows], tmp_path / "answered.jsonl")
    asked = {"prompts": str(tmp_path / "five.jsonl"), "teacher_samples": 12, "finetune": TUNE}
    record = run(mirror, tmp_path / "out", **asked)
    found = record["teacher"]["discovered"]
    assert found["given"] == 5 and found["sources"]["examples"]["kept"] == 7
    assert found["signal"] > found["drafted"] > found["general"]
    assert record["teacher"]["prompts"] == record["teacher"]["rows"] == 12 and record["teacher"]["temperature"] == 0
    assert any("from: examples" in notice for notice in record["notices"]) and found["said"] in record["notices"]
    assert record["verdict"]["verdict"] == "unmeasured"
    again = run(mirror, tmp_path / "again", **{**asked, "prompts": str(tmp_path / "answered.jsonl")})
    states = cached(again)
    assert states["prompt_drafts"] and states["prompts"] and states["teacher"]


def test_the_card_and_the_settings_beside_the_adapter_are_what_prompts_come_from(
    mirror: dict[str, Any], tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(mirror["adapter"], tmp_path / "adapter"))
    shown = "".join(f"- text: '{row['prompt']}'\n" for row in zoo.rows("neox", "mirror", "train", 3))
    (adapter / "README.md").write_text(f"---\nwidget:\n{shown}---\n```python\nprompt = (\n```\n")
    (adapter / "training_args.json").write_text('{"learning_rate": 0.0002, "output_dir": "out", "seed": 3}')
    asked = {"adapter": str(adapter), "prompts": None, "teacher_samples": 6, "finetune": TUNE}
    record = run(mirror, tmp_path / "out", prompt_sources=["card"], **asked)
    assert record["teacher"]["discovered"]["sources"]["card"]["kept"] == 6
    assert any("cannot be read as a prompt or a template, and are not used: 1" in one for one in record["notices"])
    (adapter / "README.md").unlink()
    with pytest.raises(PreflightError, match="needs a card"):
        run(mirror, tmp_path / "none", prompt_sources=["card"], **asked)


def test_drafts_are_conversations_that_both_bases_render(mirror: dict[str, Any], home: Path, tmp_path: Path) -> None:
    """The card shows a prompt with a system turn, which the new base refuses."""
    turns = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}\n{% endfor %}"
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + turns
    for name, template in (("old_base", turns), ("new_base", refusing)):
        shutil.copytree(mirror[name], tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(template)
    shutil.copytree(mirror["adapter"], tmp_path / "adapter")
    widget = "---\nwidget:\n- messages:\n  - {role: system, content: Be short}\n  - {role: user, content: mirror 1 2}\n"
    (tmp_path / "adapter" / "README.md").write_text(widget + "---\n# Mirror\n\nThis adapter mirrors its numbers.\n")
    bases = {name: str(tmp_path / name) for name in ("old_base", "new_base", "adapter")}
    asked = {"teacher": {"max_new_tokens": 16, "filter": False, "truncated": "keep"}, "prompt_sources": ["card"]}
    record = run(mirror, tmp_path / "out", **bases, **asked, prompts=None, teacher_samples=4, finetune=TUNE)
    assert record["teacher"]["discovered"]["sources"]["card"]["kept"] == record["teacher"]["rows"] == 4
    key = next(row["key"] for row in record["timings"] if row["stage"] == "prompt_drafts")
    assert '"system"' not in Store(home).open(key).file("rows.jsonl").read_text()


def test_sources_that_nothing_is_given_for_are_said_before_anything_runs(
    mirror: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(PreflightError) as raised:
        run(
            mirror, tmp_path / "out",
            prompts=None, teacher_samples=8, prompt_sources=["card", "description", "examples"],
        )  # fmt: skip
    said = str(raised.value)
    assert "needs a card" in said and "--describe" in said and "a few prompts" in said
    with pytest.raises(ConfigError, match="unknown source of prompts 'exampels'"):
        run(mirror, tmp_path / "out", prompt_sources=["exampels"])
    with pytest.raises(ConfigError, match="says nothing"):
        run(mirror, tmp_path / "out", describe="  ")
