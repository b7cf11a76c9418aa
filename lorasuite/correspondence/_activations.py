"""Hidden states of calibration texts, one vector an example and layer (LoRASuite, arXiv 2505.13515)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32, Integer
from torch import Tensor

from lorasuite.bases import ActivationRecorder, LoadedBase
from lorasuite.correspondence._options import Pooling
from lorasuite.errors import DataError, Problem
from lorasuite.progress import Progress


def hidden_states(
    base: LoadedBase,
    texts: Sequence[str],
    *,
    batch_size: int = 16,
    cutoff: int = 256,
    pooling: Pooling = "mean",
    progress: Progress | None = None,
) -> Float32[Tensor, "L N d"]:
    """Each block's output, pooled over an example's own tokens, on the CPU.

    Every model reads the texts through its own tokenizer, so rows are *examples*, never token positions: two models
    with different tokenizers give rows that pair up. Only one batch of token-level states is alive at a time.

    Args:
        pooling: ``mean`` over the example's tokens, or the ``last`` one (which a causal model computed from the whole
            example).

    Raises:
        DataError: if there is no text, or a text has no token.
    """
    if not texts:
        raise DataError(Problem("calibration", "no texts", "Give at least a few dozen lines of text."))
    tokenizer, layers = base.tokenizer, range(len(base.blocks))
    recorder = ActivationRecorder(base)
    for layer in layers:
        recorder.block(layer)
    pooled: list[Tensor] = []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    with recorder:
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            encoded = [ids[:cutoff] for ids in tokenizer(batch)["input_ids"]]
            empty = [start + n for n, ids in enumerate(encoded) if not ids]
            if empty:
                raise DataError([Problem(f"calibration text {n}", "has no token", "Remove it.") for n in empty])
            width = max(map(len, encoded))
            ids = torch.tensor([row + [pad] * (width - len(row)) for row in encoded])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in encoded], device=base.device)
            recorder.run(ids, mask)
            states = [recorder.seen[layer, "block", "out"] for layer in layers]
            pooled.append(torch.stack([_pool(h, mask, pooling) for h in states]).cpu())
            if progress is not None:
                progress(min(start + batch_size, len(texts)), len(texts))
    return torch.cat(pooled, 1).clone()


def _pool(hidden: Float[Tensor, "n t d"], mask: Integer[Tensor, "n t"], pooling: Pooling) -> Float32[Tensor, "n d"]:
    """Over the tokens of each example, which are padded on the right."""
    hidden = hidden.float()
    if pooling == "last":
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), mask.sum(1) - 1]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)
