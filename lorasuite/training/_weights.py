"""Token weights by excess loss: what the adapter changed most counts most (TiTok, arXiv 2510.04682).

The excess of a token is what the old base's loss on it is above that of the old base with the adapter. It is a
logarithm of a ratio of probabilities, so that of a unit (:mod:`lorasuite.training._units`) is the sum of its tokens',
and is spread evenly over the unit's tokens in the other tokenizer. Where TiTok leaves tokens out below a quantile, here
none is: half of a row's weight stays even, because what the old base could write without its adapter (a format, the
rest of a word) the new base may not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorasuite.training._distillation import PerToken, padded_places
from lorasuite.training._head import cross_entropies
from lorasuite.training._loss import read_labels
from lorasuite.training._units import AlignedRow

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

#: Name of a batch's weights, ``(batch, tokens)``.
WEIGHTS = "token_weights"


@dataclass(frozen=True, eq=False)
class TokenWeights(PerToken):
    """How much the label that follows each token counts."""

    weights: Tensor
    """``(T,)`` float32; their mean over the labels is 1."""

    def batch(self, examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """The weights of encoded examples, padded on the right, by name; 1 where nothing is known."""
        places = padded_places(self, examples)
        return {WEIGHTS: self.weights[places].masked_fill(places < 0, 1.0)}


def label_losses(
    model: PreTrainedModel | PeftModel, examples: Sequence[dict[str, list[int]]], batch_size: int = 16
) -> list[Tensor]:
    """The loss of each token of encoded examples, ``(tokens,)`` each, in nats; 0 where it is no label."""
    found = [torch.zeros(len(example["input_ids"])) for example in examples]
    for part in read_labels(model, examples, batch_size):
        losses = cross_entropies(part.logits, part.targets).cpu()
        for example, position, loss in zip(part.examples.tolist(), part.positions.tolist(), losses, strict=True):
            found[example][position + 1] = loss
    return found


def excess_weights(aligned: Sequence[AlignedRow], bare: Sequence[Tensor], tuned: Sequence[Tensor]) -> TokenWeights:
    """The weights of the rows' labels, ``(1 + e⁺ / mean e⁺) / 2`` of a label with the excess ``e``.

    The mean is over all labels, so that rows on which the adapter changes more count more. A label that is in no unit
    has the mean excess.

    Args:
        aligned: the rows.
        bare, tuned: losses of the tokens of each row's old encoding, of the old base and of it with the adapter
            (:func:`label_losses`).
    """
    found: list[Tensor] = []
    for row, before, after in zip(aligned, bare, tuned, strict=True):
        excess = torch.full((len(row.new["input_ids"]),), torch.nan)
        for theirs, ours in row.units:
            gained = (before - after)[theirs.start : theirs.stop].sum().clamp_min(0)
            excess[ours.start - 1 : ours.stop - 1] = gained / len(ours)
        found.append(excess)
    excess = torch.cat(found)
    mean = excess.nanmean()
    relative = torch.where(excess.isnan() | (mean == 0), 1.0, excess / mean)
    return TokenWeights(
        tokens=torch.tensor([token for row in aligned for token in row.new["input_ids"]]),
        lengths=torch.tensor([len(row.new["input_ids"]) for row in aligned]),
        weights=(1 + relative) / 2,
    )
