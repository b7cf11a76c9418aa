"""Prompts from a sentence that says what the adapter does."""

from __future__ import annotations

import math
import random

from lorasuite.teacher._given import Given, asked, fitting, grown
from lorasuite.teacher._lists import continued
from lorasuite.teacher._probe import Probe, Pull
from lorasuite.teacher._shapes import Shape, known_shapes, shape_of

#: Lists begun from the description alone, and texts of them that shapes are tried on.
LISTS, TRIED = 8, 6
#: Shapes that prompts are written in where nobody says which: none is surely the one the adapter was trained with.
SHAPES = 3


class Description:
    """The old base, its adapter off, writes a list of inputs for the task; the adapter tells in which shapes.

    Where there are examples, theirs is the shape.
    """

    name = "description"
    needs = "a sentence that says what the adapter does (--describe)"
    control = False

    def can(self, given: Given) -> bool:
        """Whether there is a description."""
        return bool(given.description.strip())

    def drafts(self, probe: Probe, given: Given, count: int) -> list[Pull]:
        """Drafts of the shape under which the adapter changes most."""
        if given.examples:
            shapes = [shape_of(given.examples)]
        else:
            shapes = known_shapes(given.description, given.chat, given.prefix, given.suffix)
        return described(probe, given.description, shapes, count, self.name)


def described(probe: Probe, description: str, shapes: list[Shape], count: int, salt: str) -> list[Pull]:
    """Drafts of inputs for a task that is described, in the shapes among these that the adapter knows best."""
    ask, tried = asked(description), min(TRIED, count)
    lists = min(LISTS, count)
    said = f"Write a list of many different texts, word for word, that people give for this task: {description}"
    first = continued(probe, [], ask, lists, salt)
    first += continued(probe, [], said, lists, f"{salt} quoted", quoted=True)
    first = random.Random(f"{probe.seed} {salt}").sample(first, len(first))
    if not first:
        return []
    found: list[Pull] = []
    for shape, pulls in fitting(probe, shapes, first[:tried], SHAPES):
        pulls += probe.pulls([shape.row(body) for body in first[tried:]])
        part = math.ceil(count / min(SHAPES, len(shapes)))
        share = max(part - len(pulls), part // 2)
        found += grown(probe, shape, [], share, ask, f"{salt} {shape}", found=pulls, on_answers=True)
    return found
