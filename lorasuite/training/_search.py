"""The start and the learning rate of a fine-tune, searched together by successive halving on rows held out.

Every arm, a start at a rate, is trained on the schedule of a whole run and paused; those expected to end behind are
dropped, the others go on from their checkpoints (successive halving: Karnin, Koren and Somekh, 2013; Jamieson and
Talwalkar, arXiv 1502.07943; dropping by an extrapolated learning curve: Domhan, Springenberg and Hutter, 2015). The
winner is trained again on every row: what was held out to choose by is training data, too, and where rows are few a
fifth of them is worth more than what training again costs.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasuite.data import Row, RowEncoder, RowSplit
from lorasuite.errors import NumericalError, Problem
from lorasuite.stored import replace_text
from lorasuite.training._effort import MOST_COMPARED, Extent, Search, SearchedArm
from lorasuite.training._finetune import finetune
from lorasuite.training._passes import Fitting
from lorasuite.training._rounds import DROPPED, rounds
from lorasuite.training._settings import FinetuneResult, FinetuneSettings

if TYPE_CHECKING:
    from peft import LoraConfig

    from lorasuite.training._distillation import SoftLabels
    from lorasuite.training._weights import TokenWeights

logger = logging.getLogger(__name__)

#: Rows that runs are compared by, at most: more cost passes, and tell no more apart.
MOST_HELD_OUT = 512
#: A start is near its task where its held-out loss, untrained, is at most this share of the bare base's. Near ones
#: want lower rates: a high one undoes what they have.
NEAR = 0.7
#: How far the trend of an arm's loss since the round before is followed to the end of its schedule; 0: not at all.
TREND = 0.5


@dataclass(frozen=True)
class Start:
    """Where a fine-tune may begin: an adapter, or a fresh LoRA of ``lora``.

    ``loss`` is its held-out loss untrained, nats per label token; None where it is not finite. ``rows`` are the rows
    that a run from it reads, with the distributions of the teacher and the token weights that are known of them.
    """

    rows: RowSplit
    loss: float | None
    adapter: Path | None = None
    lora: LoraConfig | None = None
    soft_labels: SoftLabels | None = None
    token_weights: TokenWeights | None = None


def by_distance(starts: Mapping[str, Start], bare: float | None) -> tuple[list[str], str, list[str]]:
    """Starts near the task, the fresh LoRA that rates are probed with, and the others, the best untrained first.

    Args:
        starts: by name, a fresh LoRA among them.
        bare: held-out loss of the bare base.
    """
    order = sorted(starts, key=lambda name: _order(starts[name].loss))
    probe = next(name for name, start in starts.items() if start.adapter is None)
    near = [n for n in order if starts[n].adapter is not None and _order(starts[n].loss) <= NEAR * _order(bare)]
    return near, probe, [name for name in order if name not in near and name != probe]


def further_arms(
    near: Sequence[str], far: Sequence[str], near_rates: Sequence[float], far_rates: Sequence[float]
) -> list[tuple[str, float]]:
    """The arms beside the probed ones, likely ones first: every start at its likeliest rate, then at its second."""
    arms = []
    for n in range(max(len(near_rates), len(far_rates))):
        arms += [(name, rate) for name in near for rate in near_rates[n : n + 1]]
        arms += [(name, rate) for name in far for rate in far_rates[n : n + 1]]
    return arms


def search(
    base: Any,
    tokenizer: Any,
    starts: Mapping[str, Start],
    settings: FinetuneSettings,
    extent: Extent,
    *,
    bare: float | None,
    output: Path,
    work_dir: Path,
    rehearsal: Sequence[Row] = (),
    **arguments: Any,
) -> tuple[FinetuneResult, Search]:
    """Find a start and a learning rate on rows held out, and fine-tune from it on all rows.

    Which rates suit starts that are far from the task is asked with the fresh LoRA; the others get the best of them.
    Where it is the only start, rates are tried upwards, until one does worse than the one below.
    The winner's run is followed to its end, if the budget has a step for each arm besides. Where it did best after
    fewer epochs, the final run ends after so many, and where an untrained start does better, that start is written as
    it is: on the held-out rows the result is never worse than any start.

    Killed and called again with the same arguments, it goes on: the losses found lie in ``work_dir``, and so do the
    checkpoints of the arms that are still in.

    It costs at most ``extent.budget`` times the optimizer steps of the final run (of one over :data:`MOST_COMPARED`
    rows, where there are more), that run included, and a pass over the held-out rows for each arm, round and epoch; the
    disk holds an adapter and its optimizer for each arm.

    Args:
        base: the new base, a model or its path.
        tokenizer: the new base's.
        starts: by name; all have the same rows to choose by.
        settings: of the whole run; rates are in units of its learning rate.
        extent: how much is tried.
        bare: held-out loss of the bare base.
        output: where the tuned PEFT adapter is written.
        work_dir: of the losses and checkpoints.
        rehearsal: as of :func:`finetune`, in the final run.
        arguments: the other arguments of :func:`finetune`.

    Raises:
        NumericalError: if every arm diverges; otherwise as :func:`finetune`.
    """
    runs = _Runs(base, tokenizer, starts, settings, extent.folds, work_dir, len(rehearsal), arguments)
    budget = int((extent.budget - 1) * runs.most) // extent.folds
    near, probe, far = by_distance(starts, bare)
    near_rates, far_rates = (
        [float(f"{settings.learning_rate * factor:.0e}") for factor in factors] for factors in (extent.near, extent.far)
    )
    possible = len(near) * len(near_rates) + (1 + len(far)) * len(far_rates)
    plan = rounds(min(possible, max(2, budget // DROPPED)), max(runs.schedule.values()), budget)
    most, begin = plan[0][0], 0
    probed: list[tuple[str, float]] = []
    alone, some = not near and not far, far_rates[: max(most - len(near), min(most - 1, 1))]
    for rate in sorted(some) if alone else some:
        if alone and len(probed) > 1 and runs.expected(probed[-1], 0) >= runs.expected(probed[-2], 0):
            break  # a higher rate than one that is too high already
        probed.append((probe, rate))
        runs.train(probed[-1], plan[0][1])
    far_rates.sort(key=lambda rate: runs.expected((probe, rate), 0) if (probe, rate) in probed else math.inf)
    tried = kept = [*probed, *further_arms(near, far, near_rates, far_rates)][:most]
    for count, step in plan:
        for arm in kept[count:]:
            runs.forget(arm)
        kept = kept[:count]
        for arm in kept:
            runs.train(arm, step)
        kept = sorted(kept, key=lambda arm: runs.expected(arm, begin))
        begin = step
    best = kept[0]
    (name, rate), (epochs, reached) = best, runs.best_epochs(best)
    untouched = min(starts, key=lambda name: _order(starts[name].loss))
    if _order(starts[untouched].loss) <= reached:
        name, epochs, reached = untouched, 0, _order(starts[untouched].loss)
    if not math.isfinite(reached):
        what = f"training diverged from each of {sorted({name for name, _ in tried})}"
        raise NumericalError(Problem("finetune.learning_rate", what, "Try a lower one."))
    start = starts[name]
    result = finetune(
        base,
        tokenizer,
        start.rows.trained,
        settings.model_copy(update={"learning_rate": rate}),
        adapter=start.adapter,
        lora=start.lora,
        soft_labels=start.soft_labels,
        token_weights=start.token_weights,
        output=output,
        work_dir=work_dir / "final",
        stop_after=epochs,
        fitting=runs.fitting[name],
        encoder=runs.encoder,
        rehearsal=rehearsal,
        **arguments,
    )
    # by the step reached, then by the loss there: who went further did better
    order = sorted(tried, key=lambda arm: (arm != best, -max(runs.losses(arm)), runs.last(arm)))
    found = Search(
        start=name,
        learning_rate=rate,
        epochs=epochs,
        steps=runs.steps,
        schedule=runs.schedule[name],
        cost=round((runs.steps + result.steps) / runs.whole[name], 3),
        held_out=runs.held_out,
        arms=[SearchedArm(start=arm[0], learning_rate=arm[1], losses=runs.losses(arm)) for arm in order],
    )
    shutil.rmtree(work_dir, ignore_errors=True)
    return result, found


@dataclass
class _Runs:
    """The runs that are compared: trained as far as is asked, their losses kept on disk.

    Rows are tokenized, what fits into the memory is measured, and what a start loses is computed once for all of them.
    """

    base: Any
    tokenizer: Any
    starts: Mapping[str, Start]
    settings: FinetuneSettings
    folds: int
    work_dir: Path
    #: Texts that the final run reads beside its rows.
    texts: int
    arguments: Mapping[str, Any]
    #: Optimizer steps of a whole run that is compared, and of the final one, by start.
    schedule: dict[str, int] = field(init=False)
    whole: dict[str, int] = field(init=False)
    #: Optimizer steps of a final run over as many rows as are compared on at most.
    most: int = field(init=False)
    #: arm, fold → step → loss.
    found: dict[str, dict[str, float | None]] = field(init=False)

    def __post_init__(self) -> None:
        self.encoder = RowEncoder(self.tokenizer, self.settings.cutoff)
        self.fitting = {name: Fitting() for name in self.starts}
        self.parts = {name: [start.rows.fold(n) for n in range(self.folds)] for name, start in self.starts.items()}
        #: By start and fold what is lost before the first step, as far as it was measured.
        self.begun: dict[tuple[str, int], float] = {}
        self.schedule = {name: self._steps(_compared_on(parts[0])) for name, parts in self.parts.items()}
        self.whole = {name: self._steps(start.rows.trained, self.texts) for name, start in self.starts.items()}
        self.most = max(self._steps(_spread(start.rows.trained, MOST_COMPARED)) for start in self.starts.values())
        self.held_out = sum(len(_held_out(part)) for part in next(iter(self.parts.values())))
        self._ledger = self.work_dir / "losses.json"
        self.found = json.loads(self._ledger.read_text()) if self._ledger.is_file() else {}

    @property
    def steps(self) -> int:
        """Optimizer steps of all runs."""
        return sum(max(map(int, losses)) for losses in self.found.values())

    def train(self, arm: tuple[str, float], step: int) -> None:
        """Take an arm to a step of its schedule, or to the end of it, unless it has been there or diverged before."""
        step = min(step, self.schedule[arm[0]])
        for fold in range(self.folds):
            losses = self.found.setdefault(_key(arm, fold), {})
            if str(step) not in losses and None not in losses.values():
                losses |= self._run(arm, fold, step)
                self._keep()

    def losses(self, arm: tuple[str, float]) -> dict[int, float | None]:
        """The losses by step, over all folds (see :class:`SearchedArm`)."""
        folds = [self.found[_key(arm, fold)] for fold in range(self.folds)]
        common = sorted(set(folds[0]).intersection(*folds[1:]), key=int)
        level = folds[0].get("0")
        found: dict[int, float | None] = {}
        for step in common:
            changes = [None if fold[step] is None else fold[step] - fold["0"] for fold in folds]  # type: ignore[operator]
            known = [change for change in changes if change is not None]
            found[int(step)] = (
                level + sum(known) / len(known) if level is not None and len(known) == len(folds) else None
            )
        return found

    def last(self, arm: tuple[str, float]) -> float:
        """The last of them."""
        losses = self.losses(arm)
        return _order(losses[max(losses)]) if losses else math.inf

    def expected(self, arm: tuple[str, float], begin: int) -> float:
        """Log of the loss that the arm is expected to end at, by its trend since the step ``begin``.

        A start near its task has the lower loss for long, and one far from it at its higher rate may overtake it; so
        the slope of log loss, by the learning rate spent, is followed for :data:`TREND` of what is left to spend.
        """
        losses, total = self.losses(arm), self.schedule[arm[0]]
        step = max(losses)
        now, before = (_log(losses.get(at)) for at in (step, min(begin, step)))
        if not math.isfinite(now) or begin >= step:
            return now
        spent = [learning_spent(self.settings.schedule, at, total) for at in (begin, step, total)]
        slope = (now - before) / (spent[1] - spent[0])
        return now + TREND * min(slope, 0.0) * (spent[2] - spent[1])

    def best_epochs(self, arm: tuple[str, float]) -> tuple[int | None, float]:
        """After how many epochs the loss was least, None for the last that is known; and that loss."""
        each = self._epoch(_compared_on(self.parts[arm[0]][0]))
        losses = {step: _order(loss) for step, loss in self.losses(arm).items()}
        last = max(losses)
        best = min((step for step in losses if step % each == 0 or step == last), key=lambda step: losses[step])
        return None if best == last else best // each, losses[best]

    def forget(self, arm: tuple[str, float]) -> None:
        """Remove the checkpoints of an arm that is dropped."""
        for fold in range(self.folds):
            shutil.rmtree(self.work_dir / _key(arm, fold), ignore_errors=True)

    def _run(self, arm: tuple[str, float], fold: int, step: int) -> dict[str, float | None]:
        name, rate = arm
        part = self.parts[name][fold]
        rows, held_out = _compared_on(part), _held_out(part)
        start_loss = self.begun.get((name, fold))
        if self.folds == 1 and len(held_out) == len(part.to_choose_by):
            start_loss = self.starts[name].loss
        each = self._epoch(rows)
        try:
            result = finetune(
                self.base,
                self.tokenizer,
                rows,
                self.settings.model_copy(update={"learning_rate": rate}),
                adapter=self.starts[name].adapter,
                lora=self.starts[name].lora,
                soft_labels=self.starts[name].soft_labels,
                token_weights=self.starts[name].token_weights,
                output=self.work_dir / _key(arm, fold) / "none",
                work_dir=self.work_dir / _key(arm, fold),
                validation_rows=held_out,
                pause_at=step,
                start_loss=start_loss,
                fitting=self.fitting[name],
                encoder=self.encoder,
                **self.arguments,
            )
        except NumericalError as error:
            logger.info("%s at %g: %s", name, rate, error)
            return {str(step): None}
        at = {str(point["epoch"] * each): point["loss"] for point in result.validation}
        if "0" in at:
            self.begun[name, fold] = at["0"]
        return {**at, str(step): result.validation_loss}

    def _keep(self) -> None:
        replace_text(self._ledger, json.dumps(self.found))

    def _epoch(self, rows: Sequence[Row], texts: int = 0) -> int:
        """Optimizer steps of a pass over the rows and so many texts."""
        return math.ceil((len(self.encoder(rows).examples) + texts) / self.settings.batch_size)

    def _steps(self, rows: Sequence[Row], texts: int = 0) -> int:
        return self.settings.max_steps or math.ceil(self._epoch(rows, texts) * self.settings.passes)


def _held_out(rows: RowSplit) -> list[Row]:
    return rows.to_choose_by[:MOST_HELD_OUT]


def _compared_on(rows: RowSplit) -> list[Row]:
    """The rows that compared runs are trained on: what :data:`MOST_COMPARED` leave beside a held-out fifth."""
    return _spread(rows.to_train, MOST_COMPARED * 4 // 5)


def _spread(rows: Sequence[Row], most: int) -> list[Row]:
    """At most so many rows, at even distances: labelled ones and written ones stand one behind the other."""
    count = min(len(rows), most)
    return [rows[n * len(rows) // count] for n in range(count)]


def _key(arm: tuple[str, float], fold: int) -> str:
    """Name of a run and of its folder."""
    return f"{arm[0]}-{arm[1]:g}-{fold}"


def learning_spent(schedule: str, step: int, total: int) -> float:
    """Learning rate of the first steps of a schedule together, in units of its peak; a warm-up is not counted."""
    if schedule == "linear":
        return step - step * (step - 1) / (2 * total)
    if schedule == "cosine":
        return sum(0.5 + 0.5 * math.cos(math.pi * n / total) for n in range(step))
    return float(step)


def _log(loss: float | None) -> float:
    return math.inf if loss is None else math.log(max(loss, 1e-9))


def _order(loss: float | None) -> float:
    return math.inf if loss is None else loss
