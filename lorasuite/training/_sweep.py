"""Fine-tuning at the best of several learning rates and for as long as it helps, chosen on rows held out."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasuite.data import Row, split_mixed
from lorasuite.errors import NumericalError, Problem
from lorasuite.training._finetune import finetune
from lorasuite.training._settings import FinetuneResult, FinetuneSettings

#: Rows from which on a fifth of them says anything.
FEWEST = 10
#: How far apart learning rates are that are searched for, and between which bounds.
STEP, LOWEST, HIGHEST = 3.0, 1e-5, 1e-1
#: Optimizer steps that a short fine-tune has at least, if the whole one has them: fewer do not tell starts apart.
TELLING = 24


def screen(
    base: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    settings: FinetuneSettings,
    rate: float,
    starts: Mapping[str, Path],
    *,
    written: Sequence[Row] = (),
    looked_at: Sequence[Row] = (),
    **arguments: Any,
) -> dict[str, float | None]:
    """Held-out loss of each start after a quarter of the epochs, or a few more, at one rate; None where it diverged.

    What does best untrained is often not what does best trained, and a short run tells more of it than none. The rows
    are split as in :func:`finetune_swept`.

    Args:
        starts: PEFT directories by name.
        arguments: the other arguments of :func:`lorasuite.finetune.finetune`.
    """
    parts = split_mixed(rows, written, settings.seed, looked_at)
    return {
        name: _briefly(base, tokenizer, parts, settings, rate, adapter=adapter, lora=None, **arguments)
        for name, adapter in starts.items()
    }


def _briefly(
    base: Any,
    tokenizer: Any,
    parts: tuple[list[Row], list[Row]],
    settings: FinetuneSettings,
    rate: float,
    **arguments: Any,
) -> float | None:
    """Least held-out loss of a quarter of a fine-tune on ``(rows to train on, rows held out)``."""
    train, held_out = parts
    if settings.max_steps is not None:
        length: dict[str, float] = {
            "max_steps": min(settings.max_steps, max(math.ceil(settings.max_steps / 4), TELLING))
        }
    else:
        telling = math.ceil(TELLING / math.ceil(len(train) / settings.batch_size))
        length = {"epochs": min(settings.epochs, max(math.ceil(settings.epochs / 4), telling))}
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
                validation_rows=held_out,
                **arguments,
            ).validation
        except NumericalError:
            return None
    return min((point["loss"] for point in curve), default=None)


def order(loss: float | None) -> float:
    """By which losses are compared: None, of a run that diverged, comes last."""
    return math.inf if loss is None else loss


def _search(attempt: Callable[[float], float | None], rates: Sequence[float]) -> dict[float, float | None]:
    """The loss at each rate, and at further ones while an end of them is best."""
    losses = {rate: attempt(rate) for rate in rates}
    while True:
        best = min(losses, key=lambda rate: order(losses[rate]))
        further = {min(losses): best / STEP, max(losses): best * STEP}.get(best)
        if further is None or not LOWEST <= further <= HIGHEST or losses[best] is None:
            return losses
        rate = float(f"{further:.0e}")
        losses[rate] = attempt(rate)


def finetune_swept(
    base: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    settings: FinetuneSettings,
    learning_rates: Sequence[float],
    *,
    output: Path,
    work_dir: Path,
    written: Sequence[Row] = (),
    looked_at: Sequence[Row] = (),
    briefly: bool = False,
    **arguments: Any,
) -> tuple[FinetuneResult, list[dict[str, Any]]]:
    """Fine-tune on all rows at the learning rate, and for the epochs, that did best on a held-out fifth of them.

    With one rate, or none (then the settings' own), there is nothing to choose and nothing is held out. A run that
    diverges counts as the worst. Where no rate at any epoch does better than the start itself, the start is kept as it
    is: on the held-out rows the result is never worse than what it began from (a fresh LoRA begins as the bare base).

    Args:
        rows: the user's; written: the teacher's, trained on beside them and held out as :func:`split_mixed` says.
        looked_at: more of the teacher's, only held out.
        briefly: tell the rates apart by fine-tunes as short as :func:`screen`'s, and go on by a factor of
            :data:`STEP` where the lowest or highest does best; only the best is tried at length.
        arguments: the other arguments of :func:`lorasuite.finetune.finetune`.

    Returns:
        the final run, and ``{learning_rate, validation_loss, epochs, start_loss}`` of each rate tried: its best
        held-out loss and after how many epochs, and the loss before training; ``epochs`` None of a short run.

    Raises:
        NumericalError: if every rate diverges; otherwise as :func:`lorasuite.finetune.finetune`.
    """
    rates = list(dict.fromkeys(learning_rates)) or [settings.learning_rate]
    tried: list[dict[str, Any]] = []
    stop: int | None = None
    if len(rates) > 1:
        train, held_out = parts = split_mixed(rows, written, settings.seed, looked_at)
        if briefly:
            losses = _search(lambda rate: _briefly(base, tokenizer, parts, settings, rate, **arguments), rates)
            rates = [min(losses, key=lambda rate: order(losses[rate]))]
            tried = [
                {"learning_rate": rate, "validation_loss": loss, "epochs": None, "start_loss": None}
                for rate, loss in losses.items()
                if rate not in rates
            ]
        for rate in rates:
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    curve = finetune(
                        base,
                        tokenizer,
                        train,
                        settings.model_copy(update={"learning_rate": rate}),
                        output=Path(scratch) / "adapter",
                        work_dir=work_dir / f"rate-{rate:g}",
                        validation_rows=held_out,
                        **arguments,
                    ).validation
                except NumericalError:
                    curve = []
            best = min(curve, key=lambda point: point["loss"], default=None)
            tried.append(
                {
                    "learning_rate": rate,
                    "validation_loss": best and best["loss"],
                    "epochs": best and best["epoch"],
                    "start_loss": next((point["loss"] for point in curve if point["epoch"] == 0), None),
                }
            )
        finite = [e for e in tried if e["learning_rate"] in rates and e["validation_loss"] is not None]
        if not finite:
            raise NumericalError(Problem("learning_rates", f"training diverged at each of {rates}", "Try lower ones."))
        tried.sort(key=lambda entry: entry["learning_rate"])
        chosen = min(finite, key=lambda entry: entry["validation_loss"])
        rates, stop = [chosen["learning_rate"]], chosen["epochs"]
    final = settings.model_copy(update={"learning_rate": rates[0]})
    result = finetune(
        base,
        tokenizer,
        [*rows, *written],
        final,
        output=output,
        work_dir=work_dir / "final",
        stop_after=stop,
        **arguments,
    )
    return result, tried
