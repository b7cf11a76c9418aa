"""The record: written and read back, of earlier versions, and what it says was published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lorasuite.errors import CheckpointError
from lorasuite.evaluation import Arm
from lorasuite.reporting import MigrationRecord, arm_seconds, model_card, render, show_migration, write_report
from tests.records import content, record

#: As a migration by ``auto`` wrote it before records had a schema version; a new LoRA was the best start.
UNVERSIONED = Path(__file__).parents[2] / "data" / "records" / "demo-unversioned.json"


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = record()
    made.write(tmp_path / "migration.json")
    written = json.loads((tmp_path / "migration.json").read_text())
    assert written == {"schema_version": 1, **content()}, "nothing is lost, added or renamed"
    assert MigrationRecord.read(tmp_path / "migration.json") == made


def test_a_search_is_read_as_it_was_written(tmp_path: Path) -> None:
    arm = {"start": "functional", "learning_rate": 1e-3, "losses": {"0": 0.9, "6": None}}
    search = {
        "start": "functional", "learning_rate": 1e-3, "epochs": None, "steps": 9, "schedule": 6, "cost": 2.5,
        "held_out": 6, "arms": [arm],
    }  # fmt: skip
    made = record(finetune={**content()["finetune"], "search": search})
    made.write(tmp_path / "migration.json")
    assert json.loads((tmp_path / "migration.json").read_text())["finetune"]["search"] == search
    assert MigrationRecord.read(tmp_path / "migration.json") == made


def test_a_typing_error_is_found_where_a_record_is_made() -> None:
    for wrong in ({"retained_enrgy": {}}, {"finetune": {**content()["finetune"], "screend": {}}}):
        with pytest.raises(ValidationError, match="Extra inputs"):
            record(**wrong)


def test_the_report_of_an_earlier_record_still_builds(tmp_path: Path) -> None:
    shutil.copyfile(UNVERSIONED, tmp_path / "migration.json")
    page = write_report(tmp_path).read_text()
    assert "mirror" in page and "100 % of the lead kept" in page
    found = MigrationRecord.read(UNVERSIONED)
    # nothing of it is lost: it had every field but those that came later
    before = json.loads(UNVERSIONED.read_text())
    before |= {
        "prompts": None,
        "weights": {},
        "general": None,
        "weights_sha256": None,
        **{run: before[run] | {"rehearsed": 0} for run in ("finetune", "control")},
        "verdict": before["verdict"] | {"rows": None, "detectable": None},
        "serving": {loader: {**served, "ran": False, "not_run": None} for loader, served in before["serving"].items()},
    }
    assert found.to_json() == {"schema_version": 1, **before}
    assert "# mirror for new" in model_card(found)


def test_fields_that_came_later_and_fields_that_are_gone(tmp_path: Path) -> None:
    """The first version of all had no verdict, tasks, candidates or start; unknown fields are passed over."""
    later = ("verdict", "tasks", "candidates", "comparisons", "serving", "teacher", "carried", "rank", "fit_residual",
             "head_similarity", "alignment", "key")  # fmt: skip
    old: dict[str, Any] = {name: value for name, value in content().items() if name not in later}
    for run in ("finetune", "control"):
        since = ("distilled", "validation", "start", "starts", "screened", "micro_batch_size")
        old[run] = {name: value for name, value in old[run].items() if name not in since}
    del old["adapter"]["kind"]
    old |= {"gone": 1, "layer_map": {"0": 0, "1": 2}, "old_base": {**old["old_base"], "gone": 1}}
    (tmp_path / "migration.json").write_text(json.dumps(old))
    found = MigrationRecord.read(tmp_path / "migration.json")
    assert (found.verdict.verdict, found.rank, found.published.transform) == ("unmeasured", 8, "functional")
    assert "Not measured" in write_report(tmp_path).read_text()
    (tmp_path / "migration.json").write_text(json.dumps({**old, "method": "none"}))
    assert MigrationRecord.read(tmp_path / "migration.json").published.is_new


def test_what_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "migration.json"
    for wrong, what in (
        ({**content(), "schema_version": 99}, "schema version 99.*Upgrade"),
        ({**content(), "schema_version": 1, "gone": 1}, "gone"),
        ({"key": "k"}, "no record of a migration"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=f"(?s){what}"):
            MigrationRecord.read(path)


def started(start: str, **changes: Any) -> MigrationRecord:
    return record(finetune={**content()["finetune"], "start": start}, **changes)


def test_what_was_published() -> None:
    moved = record(finetune=None, control=None).published
    assert (moved.kind, moved.arm, moved.label) == ("moved", Arm.MIGRATED, "migrated, no LFT")
    # the start that was fine-tuned best, not the transform that was best untrained
    tuned = started("procrustes").published
    assert tuned.headline == "Moved with method procrustes, then fine-tuned on 100 samples"
    assert record(method="none", finetune=None, control=None).published.arm is None


@pytest.mark.parametrize("method", ["functional", "none"])
def test_a_new_lora_is_not_called_moved(method: str) -> None:
    made = started("fresh", method=method)
    headline = "No transform helped: a new LoRA trained on 100 samples"
    assert (made.published.headline, made.label(Arm.MIGRATED_LFT)) == (headline, "new LoRA + LFT")
    card = model_card(made)
    first = card.split("# mirror for org/new\n\n")[1].split("\n")[0]
    assert first.startswith(headline) and "moved" not in first
    assert "Verdict: **needs-finetune**. No transform helped: a new LoRA" in card
    assert "| new LoRA + LFT |" in card and "migrated + LFT" not in card
    page = render(made, {})
    assert f"<p>{headline}; 28 steps" in page and "Moved with" not in page and "migrated + LFT" not in page
    assert f"<p>{headline}; exact match" in page, "the verdict"


def test_the_rows_a_new_lora_was_trained_on() -> None:
    taught = {
        "worth": True, "reason": "", "measured_on": "training rows", "scored_rows": 6, "bits_per_byte": {}, "rows": 90,
        "written": 90, "dropped": {}, "tokens": 9, "temperature": 0.0, "prompts": 90, "imitated": 0,
        "mean_log_prob": -0.1, "samples": 90, "distilled": False,
    }  # fmt: skip
    both = started("fresh", teacher=taught).published
    assert both.rows == "100 samples, 90 of them written by the old base with the adapter"
    assert started("fresh", teacher={**taught, "rows": 100}).published.rows.endswith("samples that the old base with "
                                                                                     "the adapter wrote")  # fmt: skip
    alone = started("fresh, without the teacher's rows", teacher=taught).published
    assert alone.headline == (
        "No transform helped, nor did the rows that the old adapter wrote: a new LoRA trained on 100 samples"
    )
    assert started("fresh", teacher={**taught, "worth": False}).published.rows == "100 samples"
    own = record(finetune={**content()["finetune"], "start": "fresh", "rehearsed": 13}).published
    assert own.rows == "100 samples, beside 13 texts of the new base's own"


def runs(*stages: tuple[str, str | None, float]) -> list[dict[str, Any]]:
    return [
        {"stage": stage, "label": label, "cached": True, "seconds": 0.0, "computed_seconds": seconds,
         "peak_memory_bytes": 1, "key": "k"}
        for stage, label, seconds in stages
    ]  # fmt: skip


def test_seconds_of_each_arm() -> None:
    tried = [("vocabulary", None, 100.0), ("transform", "functional", 1.0), ("transform", "procrustes", 2.0),
             ("sequential", "sequential", 4.0), ("select", None, 8.0), ("finetune", "scratch", 16.0),
             ("finetune", "alone", 32.0), ("finetune", "procrustes", 64.0),
             ("finetune", "sequential", 128.0)]  # fmt: skip
    found = arm_seconds(started("sequential", timings=runs(*tried)))
    assert found == {Arm.MIGRATED: 15, Arm.SCRATCH: 16, Arm.SCRATCH_OWN: 32, Arm.MIGRATED_LFT: 15 + 128}
    assert arm_seconds(started("procrustes", timings=runs(*tried)))[Arm.MIGRATED_LFT] == 15 + 64
    assert arm_seconds(started("fresh", timings=runs(*tried)))[Arm.MIGRATED_LFT] == 16, "nothing was moved"
    one = runs(("transform", None, 1.0), ("finetune", "migrated", 64.0))
    assert arm_seconds(started("functional", timings=one)) == {Arm.MIGRATED: 1, Arm.MIGRATED_LFT: 65}
    # in the earlier record the new LoRA's fine-tune took 10.4 s, and 37 s went to starts that lost and their choice
    assert arm_seconds(MigrationRecord.read(UNVERSIONED))[Arm.MIGRATED_LFT] == pytest.approx(10.43684)


def test_what_the_console_says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    show_migration(MigrationRecord.read(UNVERSIONED), Path("out"))
    said = capsys.readouterr().out
    assert "verdict: ship (no transform helped: a new LoRA trained on 100 samples; exact match 1" in said
    row = next(line for line in said.splitlines() if "new LoRA + LFT" in line)
    assert "10.44" in row and len(said.splitlines()) <= 24, "it fits a screen"
    assert "layer map" not in said and "sample by sample" not in said
    show_migration(MigrationRecord.read(UNVERSIONED), Path("out"), verbose=True)
    said = capsys.readouterr().out
    assert "layer map" in said and "sample by sample" in said and "verdict: ship" in said
    show_migration(record(), Path("out"), "https://hub/commit/1")
    said = capsys.readouterr().out
    assert "published: Moved with method functional, then fine-tuned on 100 samples" in said
    assert "pushed to https://hub/commit/1" in said and "functional" in said
