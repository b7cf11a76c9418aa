"""Log-likelihoods of answers, with the output head at the answers' positions only.

lm-eval's own way keeps the logits of every position of a batch and their softmax in float32: at 262,144 tokens 16 rows
of 64 are 1 GiB each, of which a prompt's are thrown away. What is asked and what comes out are lm-eval's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from lorasuite.training import LabelHead, collate, cross_entropies

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Asked(NamedTuple):
    """Tokens of a context and of the answer that is scored after it."""

    context: list[int]
    answer: list[int]


def answer_likelihoods(
    model: PreTrainedModel | PeftModel, asked: Sequence[Asked], *, longest: int, batch_size: int
) -> Iterator[tuple[int, float, bool]]:
    """Each answer's log-likelihood in nats, and whether it is what greedy decoding gives.

    Answers that differ in their last token only, such as choices of one token, are read once. The longest rows come
    first: that pads least, and memory runs out at once or not at all.

    Args:
        model: on its device, in evaluation mode.
        asked: answers of a token or more, after contexts of a token or more.
        longest: tokens that the model is given at once; those on the left are cut off.
        batch_size: rows of a forward pass.

    Yields:
        the place in ``asked``, the sum over the answer's tokens, and whether each of them is the likeliest.
    """
    reading: dict[tuple[int, ...], list[int]] = {}
    for number, (context, answer) in enumerate(asked):
        reading.setdefault(tuple([*context, *answer][-longest - 1 : -1]), []).append(number)
    device = next(model.parameters()).device
    head = LabelHead(model)
    order = sorted(reading, key=len, reverse=True)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate([{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in rows])
        scored = [(place, len(row), number) for place, row in enumerate(rows) for number in reading[row]]
        at: list[int] = []
        positions: list[int] = []
        targets: list[int] = []
        for place, length, number in scored:
            answer = asked[number].answer
            at += [place] * len(answer)
            positions += range(length - len(answer), length)
            targets += answer
        with torch.no_grad():
            states = head.states({key: value.to(device) for key, value in batch.items()})
            before = states.shape[1] - len(rows[0])  # of adapters that put tokens of their own before a row
            where = (torch.tensor(part, device=states.device) for part in (at, [before + n for n in positions]))
            rows_read = states[tuple(where)]
            del states
            found, likeliest = [], []
            for logits, wanted in head.chunks(rows_read, torch.tensor(targets)):
                wanted = wanted.to(logits.device)
                found.append(-cross_entropies(logits, wanted).cpu())
                likeliest.append((logits.argmax(-1) == wanted).cpu())
        sizes = [len(asked[number].answer) for _, _, number in scored]
        parts = zip(scored, torch.cat(found).split(sizes), torch.cat(likeliest).split(sizes), strict=True)
        for (_, _, number), nats, greedy in parts:
            yield number, float(nats.double().sum()), bool(greedy.all())
