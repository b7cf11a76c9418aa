"""Prompts from the adapter and nothing else."""

from __future__ import annotations

import statistics

from lorasuite.data import Message, Row, accepted
from lorasuite.teacher._given import ASK, Given, fitting, grown
from lorasuite.teacher._probe import Probe, Pull
from lorasuite.teacher._shapes import Shape, cut_like, known_shapes, separators, split_pairs

#: Texts written from nothing, tokens of each, and texts that shapes are tried on.
SAMPLES, TOKENS, TRIED = 64, 64, 6
#: Shapes that the search goes on with.
SHAPES = 3
#: Stands for a user's words while a chat template is asked what comes before them.
_PLACE = "\u241f\u241b\u241f"


class AdapterAlone:
    """The old base with the adapter on writes from nothing and from its chat template's beginning, as Magpie (arXiv
    2406.08464); an adapter trained with loss on its prompts writes its own. An adapter trained on answers alone does
    not, so texts of the bare base are tried too, in shapes that prompts often have; from what moves the adapter most
    the search goes on, and asks for texts on the subjects that its answers name.
    """

    name = "adapter"
    needs = ""
    control = False

    def can(self, given: Given) -> bool:
        """Always."""
        return True

    def drafts(self, probe: Probe, given: Given, count: int) -> list[Pull]:
        """Drafts of the shapes under which the adapter changes most."""
        begin = opening(probe)
        samples, tried = min(SAMPLES, 2 * count), min(TRIED, count)
        own = texts(probe, given.prefix, samples, adapter=True, salt="adapter")
        bare = list(given.general) or texts(probe, "", samples, adapter=False, salt="general")
        turns = texts(probe, begin, samples, adapter=True, salt="adapter turns") if begin else []
        turns += texts(probe, begin, samples, adapter=False, salt="turns") if begin else []
        found: list[Pull] = []
        pair = split_pairs(own)
        if pair is not None:
            rows = [row for text in own if (row := cut_like(pair, text)) is not None]
            found += grown(probe, pair, [], count, ASK, "adapter pairs", found=probe.pulls(rows))
        bodies = [line for text in (*turns, *bare) if (line := first_line(text))]
        if bodies:
            shapes = [Shape("text"), *known_shapes("", given.chat, given.prefix, given.suffix)]
            fits = fitting(probe, shapes, bodies[:tried], SHAPES)
            for mark in separators(bodies):
                cut = Shape("completion", "", mark)
                heads = [text.partition(mark)[0] for text in bodies if mark in text]
                fits += fitting(probe, [cut], heads[:tried])
            fits.sort(key=lambda fit: -statistics.fmean(pull.score for pull in fit[1]))
            for shape, pulls in fits[:SHAPES]:
                rest = [text.partition(shape.after)[0] if shape.after else text for text in bodies[tried:]]
                pulls += probe.pulls([shape.row(body) for body in rest])
                share = max(count - len(found), count // 2) // SHAPES
                found += grown(probe, shape, [], share, ASK, f"adapter {shape}", found=pulls, on_answers=True)
        return found + probe.pulls([Row("text", text=text) for text in own if pair is None and text.strip()])


def texts(probe: Probe, begin: str, count: int, *, adapter: bool, salt: str) -> list[str]:
    """Texts written from a beginning, or from nothing; what follows the beginning."""
    rows = [Row("text", text=begin)] * count
    return [answer.text for answer in probe.write(rows, salt, adapter=adapter, tokens=TOKENS)]


def opening(probe: Probe) -> str:
    """What the chat template writes before a user's first words; "" without a template, or where it writes none or
    refuses them."""
    row = Row("messages", messages=(Message("user", _PLACE),))
    if not accepted([row], [probe.tokenizer])[0]:
        return ""
    before, found, _ = probe.text(row).partition(_PLACE)
    return before if found else ""


def first_line(text: str) -> str:
    """The first line with at least three words, as the body of a prompt."""
    return next((line.strip() for line in text.splitlines() if len(line.split()) >= 3), "")
