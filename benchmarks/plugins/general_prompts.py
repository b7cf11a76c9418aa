"""Random general prompts: what a source of prompts must beat for the adapter's signal to be worth anything."""

from __future__ import annotations

import math

from lorasuite.data import Row
from lorasuite.teacher import Given, Probe, Pull, Shape, first_line, shape_of

#: Tokens of a text.
TOKENS = 48
#: Share of texts that have a line of three words, about.
USABLE = 0.7


class GeneralPrompts:
    """First lines of texts that the bare old base writes from nothing, drawn at random; the adapter chooses nothing.

    Asked as questions, or with examples given in their shape: then it is the shape alone that is of the task.
    """

    name = "general"
    needs = ""
    control = True

    def can(self, given: Given) -> bool:
        """Always."""
        return True

    def drafts(self, probe: Probe, given: Given, count: int) -> list[Pull]:
        """So many general prompts, or a few less."""
        shape = shape_of(given.examples) if given.examples else Shape("completion", "Question: ", "\nAnswer:")
        rows = [Row("text")] * math.ceil(count / USABLE)
        written = probe.write(rows, "control", adapter=False, tokens=TOKENS)
        lines = [line for answer in written if (line := first_line(answer.text))]
        return probe.pulls([shape.row(line) for line in dict.fromkeys(lines)][:count])
