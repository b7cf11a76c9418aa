"""What sources of prompts are given, and what every one of them does with drafts: keep, vary, go on."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorasuite.data import Row
from lorasuite.teacher._card import Card
from lorasuite.teacher._lists import USED, continued, plain
from lorasuite.teacher._probe import Probe, Pull, ranked
from lorasuite.teacher._shapes import Shape

#: Drafts that a round of the search goes on from: those that move the adapter most.
KEPT = 24
#: Rounds of the search; each shows the old base the best of the rounds before.
ROUNDS = 3
#: Share of the drafts that begin like kept ones, and tokens of what they go on with, or as many as the longest example.
VARIED, VARIED_TOKENS = 0.5, 48
#: Words of a short answer, which names a subject; of one in JSON, so many are read.
SHORT, NAMED = 6, 16
#: What lists are of, where nobody says.
ASK = "Write a list of many different texts of the same kind, one a line."


@dataclass(frozen=True)
class Given:
    """What the user gave, and what lies beside the adapter; all of it may be missing."""

    examples: tuple[Row, ...] = ()
    description: str = ""
    card: Card = field(default_factory=Card)
    #: Whether prompts may be conversations: both bases have chat templates, and the probe asks both.
    chat: bool = False
    #: Beginnings of general texts.
    general: tuple[str, ...] = ()
    #: What every prompt begins and ends with, where that is said.
    prefix: str = ""
    suffix: str = ""


def asked(description: str) -> str:
    """What lists are of, with a description of the task."""
    task = " ".join(description.split())
    return f"The task: {task}\nWrite a list of many different inputs for this task, one a line." if task else ASK


def grown(
    probe: Probe,
    shape: Shape,
    given: Sequence[str],
    count: int,
    ask: str,
    salt: str,
    *,
    found: Iterable[Pull] = (),
    rounds: int = ROUNDS,
    on_answers: bool = False,
) -> list[Pull]:
    """Search for prompts that move the adapter: keep the best drafts, show them to the old base, and go on.

    Args:
        shape: of the prompts.
        given: bodies of examples, which every round shows too; where they are long, so is what is written.
        count: drafts to make.
        ask: what lists are of.
        salt: with the probe's seed, what is drawn.
        found: drafts there are already, of this shape.
        rounds: of the search.
        on_answers: also ask for texts on what the adapter answered so far: of short answers, which name a subject
            (backtranslation, arXiv 2308.06259).

    Returns:
        the drafts, those found before among them, each prompt once.
    """
    pulls = {plain(shape.body(pull.row)): pull for pull in found}
    longest = max(map(probe.length, given), default=0)
    for n in range(rounds):
        there = list(pulls.values())
        best = [there[n] for n in ranked(there)[:KEPT]]
        shown = list(dict.fromkeys([*given, *(shape.body(pull.row) for pull in best)]))
        lists = math.ceil(count / rounds / USED)
        bodies = []
        subjects = _subjects(there) if on_answers else []
        if subjects:
            wanted = "Write a list of different messages from people, word for word, about"
            bodies += continued(probe, [], wanted, lists, f"{salt} on {n}", subjects, quoted=True)
            lists = math.ceil(lists / 2)
        bodies += continued(probe, shown, ask, lists, f"{salt} {n}", longest=longest)
        bodies += varied(probe, shape, shown, math.ceil(count / rounds * VARIED), f"{salt} varied {n}", longest)
        new = {plain(body): body for body in bodies if plain(body) and plain(body) not in pulls}
        pulls |= {plain(shape.body(pull.row)): pull for pull in probe.pulls([shape.row(body) for body in new.values()])}
    return list(pulls.values())


def varied(probe: Probe, shape: Shape, bodies: Sequence[str], count: int, salt: str, longest: int = 0) -> list[str]:
    """Bodies that begin like some of these: the old base, its adapter off, goes on from their first words until what
    stands behind a body, or the end of the line.

    Args:
        longest: tokens of the longest example, where there are any.
    """
    if not bodies:
        return []
    drawn = random.Random(f"{probe.seed} {salt}")
    begun = []
    for n in range(count):
        words = bodies[n % len(bodies)].split()
        kept = " ".join(words[: drawn.randrange(len(words))]) if words else ""
        begun.append(Row("text", text=(shape.before + kept).rstrip(" ")))
    answers = probe.write(begun, salt, adapter=False, tokens=max(VARIED_TOKENS, longest))
    end = shape.after.rstrip() or "\n"
    found = []
    for answer in answers:
        rest, stop, _ = answer.text.partition(end)
        whole = (answer.prompt.text + rest).removeprefix(shape.before.rstrip(" ")).strip()
        if whole and (stop or (answer.ended and not shape.after)):
            found.append(whole)
    return found


def _subjects(pulls: Sequence[Pull]) -> list[str]:
    """What short answers name, as words, each once: first those that the adapter is sure of and few prompts get."""
    scores: dict[str, float] = {}
    alike: Counter[str] = Counter()
    for pull in pulls:
        words = _named(pull.answer)
        if words:
            alike[words] += 1
            scores[words] = max(scores.get(words, 0.0), pull.score)
    return sorted(scores, key=lambda words: -scores[words] / alike[words])


def _named(answer: str) -> str:
    """A short answer as words, or the names and values of one in JSON; nothing of a long one."""
    try:
        parts = [plain(_apart(part)) for part in _parts(json.loads(answer))]
    except (ValueError, RecursionError):
        words = plain(answer).replace("_", " ").split()
        return " ".join(words) if len(words) <= SHORT else ""
    return " ".join(", ".join(part for part in parts if part).split()[:NAMED]).rstrip(",")


def _parts(found: Any, name: str = "") -> Iterator[str]:
    """Each value of a JSON document with its name before it."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from _parts(value, key)
    elif isinstance(found, list):
        for value in found:
            yield from _parts(value, name)
    elif found is not None:
        yield f"{name} {found}"


def _apart(text: str) -> str:
    """``AddToPlaylist`` and ``playlist_owner`` as words."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).replace("_", " ")


def fitting(
    probe: Probe, shapes: Sequence[Shape], bodies: Sequence[str], keep: int = 1
) -> list[tuple[Shape, list[Pull]]]:
    """The shapes that the adapter knows, best first, with its answers to some bodies under each.

    Of the half under which it is surest of its answers, those under which it changes them most: a name that was not in
    its training changes what the bare base expects, and leaves the adapter in doubt.
    """
    tried = [(shape, shape.row(body)) for shape in shapes for body in bodies]
    pulls = {id(pull.row): pull for pull in probe.pulls([row for _, row in tried])}
    of: dict[int, list[Pull]] = {n: [] for n in range(len(shapes))}
    for at, (_, row) in enumerate(tried):
        if id(row) in pulls:
            of[at // len(bodies)].append(pulls[id(row)])
    known = [(shapes[n], found) for n, found in of.items() if found]
    known.sort(key=lambda pair: statistics.fmean(pull.loss for pull in pair[1]))
    sure = known[: max(keep, math.ceil(len(known) / 2))]
    return sorted(sure, key=lambda pair: -statistics.fmean(pull.nats for pull in pair[1]))[:keep]
