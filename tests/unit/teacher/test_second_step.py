"""On-policy distillation and the second step, on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flows.second_step import outcome
from lorasuite.adapters import attached
from lorasuite.data import Row, RowSplit, encode_rows, unanswered
from lorasuite.teacher import Distilling, OnPolicy, TeacherSettings, _second_step, second_step
from lorasuite.training import FinetuneSettings, RowAligner, _trainer, finetune, held_out_divergence
from tests.integration.tiny import digit_rows, tiny_lora, tiny_model, tiny_tokenizer

WRITING = TeacherSettings(max_new_tokens=4)
TUNING = FinetuneSettings(batch_size=4, epochs=2, learning_rate=1e-2, precision="fp32", checkpoint_steps=1)


def completions(count: int) -> list[Row]:
    """Rows whose answers alone are trained on."""
    return [Row(kind="completion", prompt=row.instruction, completion=f" {row.output}") for row in digit_rows(count)]


@pytest.fixture
def distilling(request: pytest.FixtureRequest) -> Distilling:
    """A teacher and another student of one vocabulary."""
    aligner = RowAligner(tiny_tokenizer(), tiny_tokenizer(), 64)
    ids = torch.arange(len(aligner.old))
    return Distilling(
        teacher=tiny_model(1), base=tiny_model(2), aligner=aligner, common=(ids, ids),
        kind=getattr(request, "param", "on-policy"), settings=TUNING, writing=WRITING, arguments={},
    )  # fmt: skip


@pytest.fixture
def first(distilling: Distilling, tmp_path: Path) -> Path:
    """An adapter of the student."""
    made(distilling, completions(8), tmp_path / "begun", tmp_path / "begun-work")
    return tmp_path / "begun"


def made(distilling: Distilling, rows: list[Row], output: Path, work: Path) -> None:
    finetune(
        distilling.base, distilling.aligner.new, rows, TUNING,
        adapter=None, lora=tiny_lora(), output=output, work_dir=work,
    )  # fmt: skip


def distance(distilling: Distilling, adapter: Path, rows: list[Row]) -> float:
    """How far the teacher is from the student."""
    examples = encode_rows(rows, distilling.aligner.new).examples
    with attached(distilling.base, adapter) as student:
        return held_out_divergence(student, distilling.labels(rows), examples)


def tensors(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("distilling", ["on-policy", "cached"], indirect=True)
def test_the_student_comes_nearer_and_goes_on_after_an_interruption(
    distilling: Distilling, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = completions(8)
    whole = distilling.train(rows, first, tmp_path / "whole", tmp_path / "whole-work")
    assert whole.steps == 4 and all(loss["loss"] > 0 for loss in whole.losses)
    assert distance(distilling, tmp_path / "whole", rows) < distance(distilling, first, rows)
    step = _trainer.AdapterTrainer.training_step

    def interrupted(self: Any, *given: Any, **named: Any) -> torch.Tensor:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(_trainer.AdapterTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distilling.train(rows, first, tmp_path / "again", tmp_path / "again-work")
    resumed = distilling.train(rows, first, tmp_path / "again", tmp_path / "again-work")
    assert resumed.resumed_from == 2 and tensors(tmp_path / "again") == tensors(tmp_path / "whole")


def test_what_the_student_writes_depends_on_its_weights_the_step_and_the_place_alone(distilling: Distilling) -> None:
    prompts = [unanswered(row) for row in completions(6)]
    policy = OnPolicy(distilling.teacher, distilling.aligner, prompts, distilling.common, WRITING, 3)
    student: Any = distilling.base
    written, soft = policy(student, [0, 1, 2, 3], 5)
    assert soft is not None and written and bool(soft.judged.any()) and not student.training
    answered = [example["input_ids"] for example in policy(student, [2], 5)[0]]
    assert answered and answered[0] in [example["input_ids"] for example in written]
    assert [e["input_ids"] for e in policy(student, [0, 1, 2, 3], 6)[0]] != [e["input_ids"] for e in written]
    long = Row(kind="completion", prompt="say two " * 40, completion=" two")
    fits = OnPolicy(distilling.teacher, distilling.aligner, [*prompts, unanswered(long)], distilling.common, WRITING, 3)
    assert [e["input_ids"] for e in fits(student, [2, 6], 5)[0]] == answered and fits(student, [6], 5) == ([], None)
    others = OnPolicy(distilling.teacher, distilling.aligner, prompts[1:], distilling.common, WRITING, 3)
    assert others.digest() != policy.digest()


@pytest.mark.parametrize(("own", "written", "held", "on"), [(3, 3, (0, 1), "own rows"), (0, 1, (0,), "nothing")])
def test_a_second_step_of_few_rows_is_compared_by_what_is_held_out_or_not_kept(
    own: int, written: int, held: tuple[int, ...], on: str, distilling: Distilling, first: Path, tmp_path: Path
) -> None:
    """No row that the teacher wrote is held out, and then none is left to train on."""
    mine, others = tuple(completions(9)[:own]), tuple(completions(9)[own : own + written])
    split = RowSplit(mine, others, held_out=frozenset(held))
    used = Distilling(**{**vars(distilling), "kind": "cached"})
    result = second_step(
        used, split, first, output=tmp_path / "out", work_dir=tmp_path / "work",
        without_held_out=lambda output, work: made(distilling, split.to_train, output, work),
    )  # fmt: skip
    assert result.measured_on == on and (result.before is None) == (on == "nothing")
    assert (tensors(tmp_path / "out") == tensors(first)) is not result.kept
    if on == "nothing":
        assert not result.kept and "too few" in outcome(result)


@pytest.mark.parametrize(("own", "better"), [(0, True), (0, False), (12, False)])
def test_a_second_step_is_kept_where_held_out_rows_say_so(
    own: int, better: bool, distilling: Distilling, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the teacher's distributions on its own rows, or by the user's rows where there are enough: of those this
    teacher, which nobody trained, knows nothing."""
    rows = completions(10)
    mine = tuple(completions(own))
    held = range(own, own + 2) if not own else range(10)
    split = RowSplit(mine, tuple(rows), held_out=frozenset(held))
    used = Distilling(**{**vars(distilling), "kind": "cached"})
    if not own and not better:
        further = iter([0.5, 0.6])
        monkeypatch.setattr(_second_step, "held_out_divergence", lambda *given: next(further))
    asked: list[int] = []
    true = _second_step.soft_labels

    def counted(teacher: Any, aligner: Any, read: Any, *rest: Any) -> Any:
        asked.append(len(read))
        return true(teacher, aligner, read, *rest)

    monkeypatch.setattr(_second_step, "soft_labels", counted)
    result = second_step(
        used, split, first, output=tmp_path / "out", work_dir=tmp_path / "work",
        without_held_out=lambda output, work: made(distilling, split.to_train, output, work),
    )  # fmt: skip
    # of the rows held out once for both losses, of those that each run is taught by once
    assert asked == [*([] if own else [2, 8]), *([10] if own or better else [])]
    assert result.kept == better == (result.training is not None)
    assert result.measured_on == ("own rows" if own else "written rows") and result.held_out == len(held)
    assert result.before is not None and (result.after is None or (result.after < result.before) == better)
    assert (tensors(tmp_path / "out") == tensors(first)) is not better
    assert not (tmp_path / "work").exists()
