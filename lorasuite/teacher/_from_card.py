"""Prompts from the adapter's own card."""

from __future__ import annotations

from dataclasses import replace

from lorasuite.data import Row
from lorasuite.teacher._from_description import described
from lorasuite.teacher._from_examples import Examples
from lorasuite.teacher._given import Given
from lorasuite.teacher._probe import Probe, Pull
from lorasuite.teacher._shapes import Shape, known_shapes


class AdapterCard:
    """Prompts that a card shows are examples, its templates are shapes to try, and its first sentences a description.

    Without prompts, the old base writes inputs to the description.
    """

    name = "card"
    needs = "a card beside the adapter (README.md) that shows prompts or says what it does"
    control = False

    def can(self, given: Given) -> bool:
        """Whether the card says anything of prompts."""
        return bool(given.card)

    def drafts(self, probe: Probe, given: Given, count: int) -> list[Pull]:
        """Drafts like the prompts shown, or for what is described."""
        card, chat = given.card, given.chat
        shapes = [Shape("completion", *frame) for frame in card.frames]
        shown: tuple[Row, ...] = tuple(row for row in card.prompts if chat or row.kind != "messages")
        if shapes:  # what is shown beside templates are their bodies
            bodies = [row.prompt for row in shown if row.kind == "completion"]
            framed = tuple(shape.row(body) for shape in shapes[:1] for body in bodies)
            shown = (*shown, *framed)
        found: list[Pull] = []
        if shown:
            moved = sorted(probe.pulls(shown), key=lambda pull: -pull.nats)
            kind = moved[0].row.kind if moved else ""
            found = [pull for pull in moved if pull.row.kind == kind]
            examples = tuple(pull.row for pull in found)
            if examples:
                found += Examples().drafts(
                    probe, replace(given, examples=examples, description=card.description), count
                )
        if len(found) < count and card.description:
            tried = shapes or known_shapes(card.description, chat, given.prefix, given.suffix)
            found += described(probe, card.description, tried, count - len(found), self.name)
        return found
