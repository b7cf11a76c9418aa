"""Choosing a transform and its scale by measurement, or none of them (``--method auto``)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file

from lorasuite.adapters import WEIGHTS, attached
from lorasuite.data import Row, encode_rows
from lorasuite.errors import ConfigError, NumericalError, Problem
from lorasuite.training._loss import validation_loss
from lorasuite.training._sweep import loss_order

#: Scales tried on the best transform.
SCALES = (0.25, 0.5, 1.5, 2.0, 4.0)
#: The bare new base, as a candidate's name.
NOTHING = "none"


class Candidate(BaseModel):
    """The held-out loss of one transform's adapter at one scale."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field(description="the transform; none for the bare base")
    scale: float = Field(description="factor of the update; 0 for the bare base")
    loss: float | None = Field(description="nats per label token; None where it is not finite")


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
) -> list[Candidate]:
    """Held-out loss of the bare base, of each candidate, and of the best candidate at other scales, best first.

    Scales are tried on one candidate only: the whole costs ``len(candidates) + len(scales) + 1`` passes over the rows.

    Args:
        model: the new base.
        tokenizer: its own.
        candidates: method → PEFT directory.
        rows: what to choose by; never what the result is reported on.
        scales: factors of the update, beside 1.
        cutoff: tokens kept of a row.
        batch_size: rows read at once.
        device: where the model lies.

    Returns:
        everything tried. A candidate whose loss is not finite comes last.

    Raises:
        ConfigError: without rows.
    """
    if not rows:
        raise ConfigError(Problem("method", "auto has nothing to choose from or by", "Give training rows."))

    encoded = encode_rows(rows, tokenizer, cutoff)

    def measure(method: str, scale: float, wrapped: Any) -> Candidate:
        try:
            loss: float | None = validation_loss(wrapped, tokenizer, encoded, cutoff, batch_size)
        except NumericalError:
            loss = None
        return Candidate(method=method, scale=scale, loss=loss)

    tried = [measure(NOTHING, 0.0, model)]
    if not candidates:  # nothing of the adapter can be moved
        return tried
    for method, folder in candidates.items():
        with attached(model, folder, device) as wrapped:
            tried.append(measure(method, 1.0, wrapped))
    best = min(tried[1:], key=_order).method
    with attached(model, candidates[best], device) as wrapped:
        factors = [parameter for name, parameter in wrapped.named_parameters() if _is_scaled(name)]
        kept = [parameter.detach().clone() for parameter in factors]
        for scale in scales:
            for parameter, value in zip(factors, kept, strict=True):
                parameter.data.copy_(value * scale)
            tried.append(measure(best, scale, wrapped))
    return sorted(tried, key=_order)


def write_scaled(source: Path, output: Path, scale: float) -> Path:
    """A copy of an adapter whose update is ``scale`` times as large, as :func:`choose` measures it.

    With scale 0 the copy is an untrained adapter: zero ``B``, the source's ``A``.

    Args:
        source: a PEFT directory.
        output: where the copy is written.
        scale: factor of the update.

    Returns:
        ``output``.
    """
    shutil.copytree(source, output, dirs_exist_ok=True)
    tensors = load_file(source / WEIGHTS)
    scaled = {name: (t * scale if _is_scaled(name) else t).contiguous() for name, t in tensors.items()}
    save_file(scaled, output / WEIGHTS, metadata={"format": "pt"})
    return output


def _is_scaled(name: str) -> bool:
    """Whether a tensor of an adapter is the one of its module that the scale multiplies.

    That is ``B`` (with its bias, where it has one), of embeddings as well, of LoRA, DoRA and AdaLoRA. Names are those
    of a model's parameters (``….lora_B.default.weight``, ``….lora_B.default`` of AdaLoRA) or of an adapter's file
    (``….lora_B.weight``, ``….lora_B``).
    """
    return not {"lora_B", "lora_embedding_B"}.isdisjoint(name.split("."))


def _order(candidate: Candidate) -> float:
    return loss_order(candidate.loss)
