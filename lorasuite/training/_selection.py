"""Choosing a transform and its scale by measurement, or none of them (``--method auto``)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from lorasuite.adapters import WEIGHTS, attached
from lorasuite.data import Row
from lorasuite.errors import ConfigError, NumericalError, Problem
from lorasuite.training._loss import validation_loss
from lorasuite.training._sweep import order

#: Scales tried on the best transform.
SCALES = (0.25, 0.5, 1.5, 2.0, 4.0)
#: The bare new base, as a candidate's name.
NOTHING = "none"


def choose(
    model: Any,
    tokenizer: Any,
    candidates: Mapping[str, Path],
    rows: Sequence[Row],
    *,
    scales: Sequence[float] = SCALES,
    cutoff: int = 256,
    batch_size: int = 16,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Held-out loss of the bare base, of each candidate, and of the best candidate at other scales, best first.

    Scales are tried on one candidate only: the whole costs ``len(candidates) + len(scales) + 1`` passes over the rows.

    Args:
        model: the new base.
        candidates: method → PEFT directory.
        rows: what to choose by; never what the result is reported on.

    Returns:
        ``{method, scale, loss}`` of everything tried; ``method`` is ``none`` for the bare base. A candidate whose loss
        is not finite comes last, with loss None.

    Raises:
        ConfigError: without candidates or rows.
    """
    if not candidates or not rows:
        raise ConfigError(Problem("method", "auto has nothing to choose from or by", "Give training rows."))

    def loss(wrapped: Any) -> float | None:
        try:
            return validation_loss(wrapped, tokenizer, rows, cutoff, batch_size)
        except NumericalError:
            return None

    tried: list[dict[str, Any]] = [{"method": NOTHING, "scale": 0.0, "loss": loss(model)}]
    for method, folder in candidates.items():
        with attached(model, folder, device) as wrapped:
            tried.append({"method": method, "scale": 1.0, "loss": loss(wrapped)})
    best = min(tried[1:], key=_order)
    with attached(model, candidates[best["method"]], device) as wrapped:
        factors = [p for name, p in wrapped.named_parameters() if "lora_B" in name]
        kept = [p.detach().clone() for p in factors]
        for scale in scales:
            for parameter, value in zip(factors, kept, strict=True):
                parameter.data.copy_(value * scale)
            tried.append({"method": best["method"], "scale": float(scale), "loss": loss(wrapped)})
    return sorted(tried, key=_order)


def _order(entry: Mapping[str, Any]) -> float:
    return order(entry["loss"])


def write_scaled(source: Path, output: Path, scale: float) -> Path:
    """A copy of a LoRA adapter whose update is ``scale`` times as large (``B`` carries the factor).

    With scale 0 the copy is an untrained adapter: zero ``B``, the source's ``A``.
    """
    shutil.copytree(source, output, dirs_exist_ok=True)
    tensors = load_file(source / WEIGHTS)
    scaled = {name: (t * scale if ".lora_B." in name else t).contiguous() for name, t in tensors.items()}
    save_file(scaled, output / WEIGHTS, metadata={"format": "pt"})
    return output
