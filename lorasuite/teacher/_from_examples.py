"""Prompts from a handful of examples."""

from __future__ import annotations

import contextlib

from lorasuite.errors import DataError
from lorasuite.teacher._given import Given, asked, grown
from lorasuite.teacher._probe import Probe, Pull
from lorasuite.teacher._prompts import imitate
from lorasuite.teacher._shapes import shape_of


class Examples:
    """The old base, its adapter off, goes on with lists of the examples (as Self-Instruct, arXiv 2212.10560).

    Where that gives too few and all examples end alike, it also writes what stands between their beginning and their
    end: small bases that have never seen a list can do that.
    """

    name = "examples"
    needs = "a few prompts (--prompts)"
    control = False

    def can(self, given: Given) -> bool:
        """Whether there are examples."""
        return bool(given.examples)

    def drafts(self, probe: Probe, given: Given, count: int) -> list[Pull]:
        """Drafts of the examples' shape."""
        shape = shape_of(given.examples)
        bodies = [shape.body(row) for row in given.examples if row.kind == shape.kind]
        found = grown(probe, shape, bodies, count, asked(given.description), "examples", on_answers=True)
        framed = count - len(found)
        with contextlib.suppress(DataError):  # they have no common end, or the base does not come to it
            more = imitate(probe.model, probe.tokenizer, given.examples, framed, probe.settings, seed=probe.seed)
            found += probe.pulls(more)
        return found
