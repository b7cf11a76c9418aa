"""Rows drawn by a seed, and split into rows to train on and rows to choose by."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from lorasuite.data._reading import read_rows, rows_to_jsonl
from lorasuite.data._rows import Row, unanswered

#: Share of the training rows that a choice holds out.
HELD_OUT = 0.2
#: How many times rows can be held out in turn.
FOLDS = 5
#: The user's rows from which on they alone are held out, beside the teacher's: their fifth is then ten rows or more.
MIN_OWN_HOLDOUT_ROWS = 50

#: Files of a stored split: its rows by part, and which of them are held out.
PARTS = ("own", "synthetic", "selection")
SPLIT = "split.json"


def draw(rows: Sequence[Row], samples: int, seed: int) -> list[Row]:
    """At most ``samples`` rows, a seeded draw without replacement, in the order they were given."""
    if samples >= len(rows):
        return list(rows)
    return [rows[n] for n in sorted(random.Random(seed).sample(range(len(rows)), samples))]


@dataclass(frozen=True)
class RowSplit:
    """The rows of one migration, drawn and split once: all that train, fit or choose use the same parts.

    ``own`` are the user's labelled rows, ``synthetic`` those that the teacher wrote to train on, ``selection`` those
    that it wrote to be read and chosen by only. ``held_out`` and ``left_out`` are places in the three, one after the
    other: the former to choose by, the latter neither to choose by nor to fit on (the teacher's answers to prompts
    that are held out).
    """

    own: tuple[Row, ...] = ()
    synthetic: tuple[Row, ...] = ()
    selection: tuple[Row, ...] = ()
    held_out: frozenset[int] = frozenset()
    left_out: frozenset[int] = frozenset()

    @property
    def trained(self) -> list[Row]:
        """Every row that a final fine-tune trains on: the user's and the synthetic ones."""
        return [*self.own, *self.synthetic]

    @property
    def to_train(self) -> list[Row]:
        """What a fine-tune trains on while something is chosen by :attr:`to_choose_by`."""
        return self._kept(len(self.own) + len(self.synthetic))

    @property
    def to_fit(self) -> list[Row]:
        """What transforms may read: :attr:`to_train`, and the selection rows that are not held out."""
        return self._kept(len(self.own) + len(self.synthetic) + len(self.selection))

    @property
    def to_choose_by(self) -> list[Row]:
        """The rows held out."""
        return [row for n, row in enumerate(self._all()) if n in self.held_out]

    def fold(self, n: int) -> RowSplit:
        """The same rows with others of those that are trained on held out: 0 this split, 1 to 4 disjoint others."""
        if n == 0:
            return self
        own = len(self.own)
        among = (
            own if max(self.held_out, default=0) < own and own >= MIN_OWN_HOLDOUT_ROWS else own + len(self.synthetic)
        )
        held = frozenset([n for n in range(among) if n not in self.held_out][n - 1 :: FOLDS - 1])
        left = _answered(held, self.own, list(self._all())) if among == own else frozenset()
        return RowSplit(self.own, self.synthetic, self.selection, held, left)

    def _all(self) -> chain[Row]:
        return chain(self.own, self.synthetic, self.selection)

    def _kept(self, end: int) -> list[Row]:
        away = self.held_out | self.left_out
        return [row for n, row in enumerate(self._all()) if n < end and n not in away]

    def files(self) -> dict[str, bytes]:
        """The split as files, for :meth:`read`; parts without rows have none."""
        parts = {f"{name}.jsonl": rows_to_jsonl(getattr(self, name)) for name in PARTS if getattr(self, name)}
        return parts | {
            SPLIT: json.dumps({"held_out": sorted(self.held_out), "left_out": sorted(self.left_out)}).encode()
        }

    @classmethod
    def read(cls, folder: Path) -> RowSplit:
        """What :meth:`files` wrote, from the directory that the files are in.

        Raises:
            DataError: if one of them is damaged.
        """
        files = [folder / f"{name}.jsonl" for name in PARTS]
        own, synthetic, selection = (tuple(read_rows(file)) if file.is_file() else () for file in files)
        places = json.loads((folder / SPLIT).read_text())
        return cls(own, synthetic, selection, frozenset(places["held_out"]), frozenset(places["left_out"]))


def split_rows(
    own: Sequence[Row], synthetic: Sequence[Row] = (), selection: Sequence[Row] = (), *, seed: int
) -> RowSplit:
    """Hold out a seeded fifth, and at least one row, to choose by.

    With :data:`MIN_OWN_HOLDOUT_ROWS` of the user's own, only those are held out, the same ones whatever the teacher
    wrote; what it wrote to their prompts is left out then. With fewer, a fifth of all is held out.

    Args:
        own: the user's labelled rows.
        synthetic: rows the teacher wrote to train on.
        selection: rows the teacher wrote to be read and chosen by, never to train on.
    """
    every = [*own, *synthetic, *selection]
    among = len(own) if len(own) >= MIN_OWN_HOLDOUT_ROWS else len(every)
    order = list(range(among))
    random.Random(seed).shuffle(order)
    held = frozenset(order[: max(1, round(HELD_OUT * among))]) if every else frozenset()
    left = _answered(held, own, every) if among < len(every) else frozenset()
    return RowSplit(tuple(own), tuple(synthetic), tuple(selection), held, left)


def _answered(held: frozenset[int], own: Sequence[Row], every: Sequence[Row]) -> frozenset[int]:
    """Places of the teacher's rows that answer prompts of the user's rows that are held out."""
    prompts = {unanswered(own[n]) for n in held}
    return frozenset(n for n in range(len(own), len(every)) if unanswered(every[n]) in prompts)
