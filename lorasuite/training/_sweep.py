"""Fine-tuning at the best of several learning rates and for as long as it helps, chosen by rows held out."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from lorasuite.data import Row, RowEncoder, RowSplit
from lorasuite.errors import NumericalError, Problem
from lorasuite.training._finetune import finetune
from lorasuite.training._passes import Fitting
from lorasuite.training._settings import FinetuneResult, FinetuneSettings

#: Fewest optimizer steps of a short fine-tune, if the whole one has as many: fewer do not tell starts apart.
MIN_SHORT_STEPS = 24


class TriedRate(BaseModel):
    """What fine-tuning at one learning rate came to on the rows held out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float
    validation_loss: float | None = Field(description="least held-out loss, nats per label token; None: diverged")
    epochs: int | None = Field(
        description="after how many epochs that was; None: of a short or paused run, or diverged"
    )
    start_loss: float | None = Field(description="held-out loss before training; None as for epochs")


def loss_order(loss: float | None) -> float:
    """Key to sort losses by: None, of a run that diverged, comes last."""
    return math.inf if loss is None else loss


def screen(
    base: Any,
    tokenizer: Any,
    rows: RowSplit,
    settings: FinetuneSettings,
    rate: float,
    starts: Mapping[str, Path],
    **arguments: Any,
) -> dict[str, float | None]:
    """Held-out loss of each start after a quarter of the epochs, or a few more, at one rate; None where it diverged.

    The best adapter before training is often not the best start, and a short fine-tune tells more of it than none.

    Args:
        base: the new base, a model or its path.
        tokenizer: the new base's.
        rows: the rows, split.
        settings: of the whole fine-tune.
        rate: learning rate of all.
        starts: PEFT directories by name.
        arguments: the other arguments of :func:`finetune`.
    """
    arguments["encoder"] = RowEncoder(tokenizer, settings.cutoff)
    return {
        name: _short_loss(base, tokenizer, rows, settings, rate, adapter=adapter, lora=None, **arguments)
        for name, adapter in starts.items()
    }


def finetune_swept(
    base: Any,
    tokenizer: Any,
    rows: RowSplit,
    settings: FinetuneSettings,
    learning_rates: Sequence[float],
    *,
    output: Path,
    work_dir: Path,
    rehearsal: Sequence[Row] = (),
    **arguments: Any,
) -> tuple[FinetuneResult, list[TriedRate]]:
    """Fine-tune on all rows at the learning rate, and for the epochs, that did best on the rows held out.

    With one rate, or none (then the settings' own), there is nothing to choose and nothing is held out. A run that
    diverges counts as the worst. Where no rate at any epoch does better than the start itself, the start is kept as it
    is: on the held-out rows the result is never worse than what it began from (a fresh LoRA begins as the bare base).

    Args:
        base: the new base, a model or its path.
        tokenizer: the new base's.
        rows: the rows, split: rates are tried on ``to_train``, chosen by ``to_choose_by``, and the final run has
            ``trained``.
        settings: of the fine-tune, but for its learning rate.
        learning_rates: those to try.
        output: where the tuned PEFT adapter is written.
        work_dir: of the checkpoints, a folder in it for each run.
        rehearsal: as of :func:`finetune`, in the final run.
        arguments: the other arguments of :func:`finetune`.

    Returns:
        the final run, and each rate tried, by rate; none where there was nothing to choose.

    Raises:
        NumericalError: if every rate diverges; otherwise as :func:`finetune`.
    """
    rates = list(dict.fromkeys(learning_rates)) or [settings.learning_rate]
    arguments |= {"encoder": RowEncoder(tokenizer, settings.cutoff), "fitting": Fitting()}  # of all the runs
    tried: list[TriedRate] = []
    rate, stop = rates[0], None
    if len(rates) > 1:
        known: float | None = None  # of the start, which is the same at every rate
        for rate in rates:
            one = _try_rate(base, tokenizer, rows, settings, rate, work_dir, start_loss=known, **arguments)
            known = one.start_loss if known is None else known
            tried.append(one)
        tried.sort(key=lambda entry: entry.learning_rate)
        best = min(tried, key=lambda entry: loss_order(entry.validation_loss))
        if best.validation_loss is None:
            raise NumericalError(Problem("learning_rates", f"training diverged at each of {rates}", "Try lower ones."))
        rate, stop = best.learning_rate, best.epochs
    result = finetune(
        base,
        tokenizer,
        rows.trained,
        settings.model_copy(update={"learning_rate": rate}),
        output=output,
        work_dir=work_dir / "final",
        stop_after=stop,
        rehearsal=rehearsal,
        **arguments,
    )
    return result, tried


def _try_rate(
    base: Any, tokenizer: Any, rows: RowSplit, settings: FinetuneSettings, rate: float, work_dir: Path, **arguments: Any
) -> TriedRate:
    """A whole fine-tune at one rate, on the rows that are not held out."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            curve = finetune(
                base,
                tokenizer,
                rows.to_train,
                settings.model_copy(update={"learning_rate": rate}),
                output=Path(scratch) / "adapter",
                work_dir=work_dir / f"rate-{rate:g}",
                validation_rows=rows.to_choose_by,
                **arguments,
            ).validation
        except NumericalError:
            curve = []
    best = min(curve, key=lambda point: point["loss"], default=None)
    return TriedRate(
        learning_rate=rate,
        validation_loss=best and best["loss"],
        epochs=best and best["epoch"],
        start_loss=next((point["loss"] for point in curve if point["epoch"] == 0), None),
    )


def _short_loss(
    base: Any, tokenizer: Any, rows: RowSplit, settings: FinetuneSettings, rate: float, **arguments: Any
) -> float | None:
    """Least held-out loss of a quarter of a fine-tune at one rate; None where it diverged."""
    train = rows.to_train
    if settings.max_steps is not None:
        length: dict[str, float] = {
            "max_steps": min(settings.max_steps, max(math.ceil(settings.max_steps / 4), MIN_SHORT_STEPS))
        }
    else:
        fewest = math.ceil(MIN_SHORT_STEPS / math.ceil(len(train) / settings.batch_size))
        length = {"epochs": min(settings.passes, max(math.ceil(settings.passes / 4), fewest))}
    short = settings.model_copy(update={"learning_rate": rate, **length})
    with tempfile.TemporaryDirectory() as folder:
        try:
            curve = finetune(
                base,
                tokenizer,
                train,
                short,
                output=Path(folder) / "adapter",
                work_dir=Path(folder) / "work",
                validation_rows=rows.to_choose_by,
                **arguments,
            ).validation
        except NumericalError:
            return None
    return min((point["loss"] for point in curve), default=None)
