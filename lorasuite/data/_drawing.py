"""Rows drawn by a seed, and split into rows to train on and rows to choose by."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorasuite.data._rows import Row, unanswered

if TYPE_CHECKING:
    pass


def draw(rows: Sequence[Row], samples: int, seed: int) -> list[Row]:
    """At most ``samples`` rows, a seeded draw without replacement, in the order they were given."""
    if samples >= len(rows):
        return list(rows)
    return [rows[n] for n in sorted(random.Random(seed).sample(range(len(rows)), samples))]


#: Share of the training rows a sweep holds out to choose by.
HELD_OUT = 0.2
#: The user's rows from which on they alone are held out, beside the teacher's: their fifth is then ten rows or more.
ENOUGH = 50


def split(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """A seeded split into rows to train on and rows to choose by, a fifth of them and at least one."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    held = max(1, round(HELD_OUT * len(rows)))
    return [rows[n] for n in sorted(order[held:])], [rows[n] for n in sorted(order[:held])]


def split_mixed(
    own: Sequence[Row], written: Sequence[Row], seed: int, looked_at: Sequence[Row] = ()
) -> tuple[list[Row], list[Row]]:
    """The split of the user's rows and the teacher's.

    With :data:`ENOUGH` of the user's, only those are held out, the same ones whatever the teacher wrote; what it wrote
    to their prompts is not trained on. With fewer, a fifth of all is held out.

    Args:
        looked_at: more of the teacher's rows, to be held out with the others but never to train on.
    """
    others = [*written, *looked_at]
    if not others or len(own) < ENOUGH:
        train, held_out = split([*own, *others], seed)
    else:
        train, held_out = split(own, seed)
        prompts = {unanswered(row) for row in held_out}
        train += [row for row in written if unanswered(row) not in prompts]
    never = {id(row) for row in looked_at}
    return [row for row in train if id(row) not in never], held_out
