"""Fine-tuning at the best of several learning rates, chosen on rows held out from training."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasuite.data import Row
from lorasuite.errors import NumericalError, Problem
from lorasuite.finetune import FinetuneResult, FinetuneSettings, finetune

#: Share of the training rows a sweep holds out to choose by.
HELD_OUT = 0.2


def split(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """A seeded split into rows to train on and rows to choose by, a fifth of them and at least one."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    held = max(1, round(HELD_OUT * len(rows)))
    return [rows[n] for n in sorted(order[held:])], [rows[n] for n in sorted(order[:held])]


def finetune_swept(
    base: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    settings: FinetuneSettings,
    learning_rates: Sequence[float],
    *,
    output: Path,
    work_dir: Path,
    **arguments: Any,
) -> tuple[FinetuneResult, list[dict[str, Any]]]:
    """Fine-tune on all rows at the learning rate that did best on a held-out fifth of them.

    With one rate, or none (then the settings' own), there is nothing to choose and nothing is held out. A run that
    diverges counts as the worst.

    Args:
        arguments: the other arguments of :func:`lorasuite.finetune.finetune`.

    Returns:
        the final run, and ``{learning_rate, validation_loss}`` of each rate tried.

    Raises:
        NumericalError: if every rate diverges; otherwise as :func:`lorasuite.finetune.finetune`.
    """
    rates = list(dict.fromkeys(learning_rates)) or [settings.learning_rate]
    tried: list[dict[str, Any]] = []
    if len(rates) > 1:
        train, held_out = split(rows, settings.seed)
        for rate in rates:
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    loss = finetune(
                        base,
                        tokenizer,
                        train,
                        settings.model_copy(update={"learning_rate": rate}),
                        output=Path(scratch) / "adapter",
                        work_dir=work_dir / f"rate-{rate:g}",
                        validation_rows=held_out,
                        **arguments,
                    ).validation_loss
                except NumericalError:
                    loss = None
            tried.append({"learning_rate": rate, "validation_loss": loss})
        finite = [entry for entry in tried if entry["validation_loss"] is not None]
        if not finite:
            raise NumericalError(Problem("learning_rates", f"training diverged at each of {rates}", "Try lower ones."))
        rates = [min(finite, key=lambda entry: entry["validation_loss"])["learning_rate"]]
    chosen = settings.model_copy(update={"learning_rate": rates[0]})
    return finetune(base, tokenizer, rows, chosen, output=output, work_dir=work_dir / "final", **arguments), tried
