"""Rehearsal: texts that the bare base wrote itself are read beside the task's rows, so that less is forgotten.

This is self-synthesized rehearsal (Huang et al. 2024, arXiv:2403.01244) at its plainest: what the base writes from
nothing, at temperature 1, which nobody has to have and no task has shaped. Only some of its tokens are labels, at other
places in every text: the output head costs more than all blocks where vocabularies are large, and what it predicts of
neighbouring tokens is much alike.

The texts are written once for a base, and serve every adapter. Arms of a search or sweep are compared without them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorasuite.data import IGNORED, Row

#: Texts that are written, tokens of each, and of how many of these one is a label.
OWN_TEXTS, OWN_TOKENS, LABELLED = 64, 32, 4


def texts_beside(share: float, rows: int) -> int:
    """How many texts are read beside so many rows: a ``share`` as many, as far as some are written."""
    return min(math.ceil(share * rows), OWN_TEXTS)


def rehearsed(texts: Sequence[Row], share: float, rows: int) -> list[Row]:
    """The texts that are read beside so many rows."""
    return list(texts[: texts_beside(share, rows)])


def thinned(texts: Sequence[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """Encoded texts in which one token in :data:`LABELLED` is a label; those without any are left out.

    Args:
        texts: with ``labels``, IGNORED where none is.
    """
    found = []
    for n, text in enumerate(texts):
        labels = [label if at % LABELLED == n % LABELLED else IGNORED for at, label in enumerate(text["labels"])]
        if any(label != IGNORED for label in labels):
            found.append({**text, "labels": labels})
    return found
