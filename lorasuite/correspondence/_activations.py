"""Hidden states of calibration texts, one vector an example and layer (LoRASuite, arXiv 2505.13515)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32, Integer
from torch import Tensor

from lorasuite.bases import LayerStream, LoadedBase, length_batches, main_stream
from lorasuite.correspondence._options import Pooling
from lorasuite.errors import DataError, Problem
from lorasuite.progress import Progress


def hidden_states(
    base: LoadedBase,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    cutoff: int = 256,
    pooling: Pooling = "mean",
    progress: Progress | None = None,
) -> Float32[Tensor, "L N d"]:
    """Each block's output, pooled over an example's own tokens, on the CPU.

    Every model reads the texts through its own tokenizer, so rows are *examples*, never token positions: two models
    with different tokenizers give rows that pair up. Texts go through the base block by block, in batches of like
    length (:class:`lorasuite.bases.LayerStream`, which has what that costs), and are summed on the device in float32.
    The result is ``4·L·N·d`` bytes: 134 MB for 256 texts at 8B.

    Args:
        batch_size: texts of a forward pass.
        pooling: ``mean`` over the example's tokens, or the ``last`` one (which a causal model computed from the whole
            example).
        progress: told of each block.

    Raises:
        DataError: if there is no text, or a text has no token.
    """
    if not texts:
        raise DataError(Problem("calibration", "no texts", "Give at least a few dozen lines of text."))
    batches = length_batches(texts, base.tokenizer, cutoff, batch_size)
    layers = len(base.blocks)
    pooled = torch.empty(layers, len(texts), base.dims.hidden_size)
    with LayerStream(base, [batch.ids for batch in batches]) as stream:
        for layer in range(layers):
            for number, batch in enumerate(batches):
                pooled[layer, batch.numbers] = _pool(main_stream(stream.run(number)), batch.lengths, pooling).cpu()
            stream.advance()
            if progress is not None:
                progress(layer + 1, layers)
    return pooled


def _pool(hidden: Float[Tensor, "n t d"], lengths: Integer[Tensor, " n"], pooling: Pooling) -> Float32[Tensor, "n d"]:
    """Over the tokens of each example, which are padded on the right."""
    lengths = lengths.to(hidden.device)
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1].float()
    own = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    return (hidden.float() * own[:, :, None]).sum(1) / lengths[:, None]
