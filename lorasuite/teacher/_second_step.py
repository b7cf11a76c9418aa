"""A second step after the fine-tune on rows that the teacher wrote, kept only where held-out rows say so."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lorasuite.adapters import attached
from lorasuite.data import Row, RowSplit, encode_rows, unanswered
from lorasuite.errors import NumericalError
from lorasuite.stored import replace_text
from lorasuite.teacher._on_policy import OnPolicy
from lorasuite.teacher._settings import TeacherSettings
from lorasuite.training import (
    FinetuneResult,
    FinetuneSettings,
    RowAligner,
    SecondStep,
    SecondStepResult,
    SoftLabels,
    finetune,
    held_out_divergence,
    soft_labels,
    validation_loss,
)

#: Held-out rows of the user's from which on they alone decide.
FEWEST_OWN = 10


@dataclass(frozen=True)
class Distilling:
    """What both kinds of second step need: the teacher, and the student's base, tokenizers and settings.

    Attributes:
        teacher: the old base with its adapter, on its device.
        base: the new base.
        aligner: of the teacher's tokenizer and the new base's.
        common: paired ids of the tokens that both vocabularies hold.
        kind: ``on-policy``, or ``cached``: the teacher's distributions on what it wrote, computed once
            (arXiv 2604.13010), in place of cross-entropy.
        settings: of the second step's training.
        writing: of the student's answers.
        arguments: the other arguments of :func:`lorasuite.training.finetune`.
    """

    teacher: Any
    base: Any
    aligner: RowAligner
    common: tuple[Tensor, Tensor]
    kind: SecondStep
    settings: FinetuneSettings
    writing: TeacherSettings
    arguments: dict[str, Any]

    def train(self, rows: Sequence[Row], start: Path, output: Path, work_dir: Path) -> FinetuneResult:
        """Distil into an adapter, by rows that the teacher wrote or by their prompts."""
        taught: dict[str, Any]
        if self.kind == "cached":
            taught = {"soft_labels": self.labels(rows)}
        else:
            prompts = [unanswered(row, self.writing.text_prefix) for row in rows]
            seed = self.settings.seed
            taught = {"on_policy": OnPolicy(self.teacher, self.aligner, prompts, self.common, self.writing, seed)}
        return finetune(
            self.base,
            self.aligner.new,
            rows,
            self.settings.model_copy(update={"distillation": 1.0, "distillation_temperature": 1.0}),
            adapter=start,
            lora=None,
            output=output,
            work_dir=work_dir,
            **taught,
            **self.arguments,
        )

    def labels(self, rows: Sequence[Row]) -> SoftLabels:
        """The teacher's distributions on rows."""
        return soft_labels(self.teacher, self.aligner, rows, self.common)


def second_step(
    distilling: Distilling,
    rows: RowSplit,
    first: Path,
    *,
    output: Path,
    work_dir: Path,
    without_held_out: Callable[[Path, Path], Any] | None,
) -> SecondStepResult:
    """Distil further from the first step's adapter, and keep the result where held-out rows say so.

    The first step has trained on the rows held out, so it says nothing on them: it is made again without them, the
    second step goes on from that, and both are compared. Ten or more held-out rows of the user's decide by their
    cross-entropy. Otherwise the teacher's do by how far its distributions are from the student's: its own words would
    say less, as a teacher that wrote them greedily is more certain of nothing than of its own words. Where the rows are
    so few that none of the teacher's is held out, the user's decide; where none is left to train on, it is not kept.

    Killed and called again with the same arguments, it goes on.

    Args:
        distilling: how.
        rows: the rows, split; those that the teacher wrote are distilled on.
        first: the first step's adapter.
        output: where the adapter is written, the first step's where the second is not kept.
        work_dir: of checkpoints and of what was found so far.
        without_held_out: makes the first step's adapter without the rows held out, of an output and a work directory;
            None: nothing is compared, and the result is kept.

    Raises:
        DataError: no row of the teacher's, or none whose two tokenizations pair anywhere.
        NumericalError: it diverges, and nothing is compared.
    """
    before = after = None
    measured: Literal["own rows", "written rows", "nothing"] = "nothing"
    held: list[Row] = []
    if without_held_out is not None:
        own = set(rows.own)
        mine = [row for row in rows.to_choose_by if row in own]
        written = [row for row in rows.to_choose_by if row not in own]
        if set(rows.synthetic) & set(rows.to_train):
            held, measured = (written, "written rows") if written and len(mine) < FEWEST_OWN else (mine, "own rows")
            before, after = _compared(distilling, rows, held, measured == "own rows", work_dir, without_held_out)
    kept = without_held_out is None or (before is not None and after is not None and after < before)
    training = None
    if kept:
        try:
            training = distilling.train(rows.synthetic, first, output, work_dir / "final")
        except NumericalError:
            if without_held_out is None:
                raise
            kept = False
    if not kept:
        shutil.copytree(first, output)
    result = SecondStepResult(
        kind=distilling.kind,
        kept=kept,
        measured_on=measured,
        held_out=len(held),
        before=before,
        after=after,
        training=training,
    )
    shutil.rmtree(work_dir, ignore_errors=True)
    return result


def _compared(
    distilling: Distilling,
    rows: RowSplit,
    held: Sequence[Row],
    own: bool,
    work_dir: Path,
    without_held_out: Callable[[Path, Path], Any],
) -> tuple[float | None, float | None]:
    """What the first step loses on held-out rows, and the second after it, both trained without them."""
    known = work_dir / "held_out.json"
    if known.is_file():
        found = json.loads(known.read_text())
        return found["before"], found["after"]
    begun, gone_on = work_dir / "first", work_dir / "second"
    training = set(rows.to_train)
    before: float | None = None
    after: float | None = None
    judged = None if own else distilling.labels(held)
    with contextlib.suppress(NumericalError):  # what diverges has no loss
        if not begun.exists():
            without_held_out(begun, work_dir / "first-work")
        before = _held_out_loss(distilling, begun, held, judged)
        if not gone_on.exists():
            taught = [row for row in rows.synthetic if row in training]
            distilling.train(taught, begun, gone_on, work_dir / "second-work")
        after = _held_out_loss(distilling, gone_on, held, judged)
    replace_text(known, json.dumps({"before": before, "after": after}))
    return before, after


def _held_out_loss(distilling: Distilling, adapter: Path, held: Sequence[Row], judged: SoftLabels | None) -> float:
    """Cross-entropy on the user's rows, or the divergence from what the teacher says of those that it wrote."""
    tokenizer, cutoff = distilling.aligner.new, distilling.aligner.cutoff
    with attached(distilling.base, adapter, distilling.arguments.get("device", "cpu")) as student:
        if judged is None:
            return validation_loss(student, tokenizer, held, cutoff, distilling.settings.batch_size)
        examples = [e for e in encode_rows(held, tokenizer, cutoff).examples if e["input_ids"] in judged]
        return held_out_divergence(student, judged, examples)
