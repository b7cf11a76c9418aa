"""Lists that the old base, its adapter off, goes on with: of texts like those it is shown, or on a subject."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from lorasuite.data import Message, Row, endless
from lorasuite.errors import DataError, Problem
from lorasuite.teacher._probe import Probe

#: Tokens of a list's continuation; where examples are long, as many as this many of the longest have.
LIST_TOKENS, LIST_TEXTS = 192, 3
#: Texts a list shows, and texts of a continuation that are used: later ones repeat themselves.
SHOWN, USED = 6, 8
#: Characters of a text, at most, where no example says how long they are; else as many times the longest's.
LONGEST, TIMES_LONGEST = 400, 3


def continued(
    probe: Probe,
    shown: Sequence[str],
    ask: str,
    lists: int,
    salt: str,
    subjects: Sequence[str] = (),
    quoted: bool = False,
    longest: int = 0,
) -> list[str]:
    """New texts: the old base without its adapter goes on with lists of some of the texts shown.

    In its chat template, where it has one, the list is the answer that it has begun; else it is plain text.

    Args:
        shown: texts, of which each list has a few in an order of its own: as many as leave room for two like them.
        ask: what the list is of.
        lists: how many.
        salt: with the seed, what is drawn.
        subjects: each list's own, in turn, put to what is asked.
        quoted: begin the list with a quotation mark, so that it is of what people say and not of what is said about it.
        longest: tokens of the longest example, where there are any.

    Returns:
        those of all lists, without those shown; what repeats one is left out.

    Raises:
        DataError: if the chat template takes too long for what is asked, or writes too much.
    """
    drawn = random.Random(f"{probe.seed} {salt}")
    block = any("\n" in text for text in shown)
    wanted = [f"{ask} {subjects[n % len(subjects)]}" if subjects else ask for n in range(lists)]
    begun = []
    for opening in _openings(probe.tokenizer, wanted):
        some = drawn.sample(list(shown), min(SHOWN, len(shown)))
        while len(some) > 1 and not _has_room(probe, opening + _items(some, block), some):
            some.pop()
        begun.append(Row(kind="text", text=opening + _items(some, block) + (' "' if quoted else "")))
    answers = probe.write(begun, salt, adapter=False, tokens=list_tokens(longest))
    most = TIMES_LONGEST * max((len(text) for text in shown), default=0) or LONGEST
    known = {plain(text) for text in shown}
    found = []
    for answer in answers:
        items = list(_read(answer.text, block))
        for text in items[: USED if answer.ended else min(USED, len(items) - 1)]:  # the last one may be cut off
            if text and len(text) <= most and plain(text) not in known:
                known.add(plain(text))
                found.append(text)
    return found


def list_tokens(longest: float) -> int:
    """Tokens of a list's continuation, where the longest example has so many."""
    return max(LIST_TOKENS, math.ceil(LIST_TEXTS * longest))


def plain(text: str) -> str:
    """A text by which repetitions are found: its words in small letters."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _openings(tokenizer: Any, asks: Sequence[str]) -> list[str]:
    """What is asked, each as a chat's user asks it; as the headline of a list without a chat template, or where it
    refuses that."""
    if getattr(tokenizer, "chat_template", None) is None:
        return [_headline(ask) for ask in asks]
    turns = [Message("user", ask) for ask in asks]
    where = "a list that prompts are drafted in"
    if beyond := endless([Row("messages", messages=(turn,), where=where) for turn in turns], [tokenizer]):
        remedy = "Mend the template, or take another copy of the model."
        raise DataError([Problem(where, problem.what, remedy) for problem in beyond])
    found = []
    for turn in turns:
        try:
            asked = tokenizer.apply_chat_template([turn.turn()], tokenize=False, add_generation_prompt=True)
        except Exception:  # a template is code of the checkpoint's author and raises what it likes
            asked = _headline(turn.content)
        found.append(str(asked))
    return found


def _headline(ask: str) -> str:
    return f"{ask}\n\n"


def _has_room(probe: Probe, begun: str, shown: Sequence[str]) -> bool:
    """Whether two texts like the longest shown fit behind a list that is begun: of those written, the last may be cut
    off, and is not used."""
    return probe.length(begun) + 2 * max(map(probe.length, shown)) <= probe.context


def _items(texts: Sequence[str], block: bool) -> str:
    """A list of texts, begun to be gone on with: numbered lines, or blocks where a text has several lines."""
    head, end = ("### {}\n", "\n\n") if block else ("{}. ", "\n")
    found = "".join(head.format(n) + text.strip() + end for n, text in enumerate(texts, start=1))
    return found + head.format(len(texts) + 1).rstrip(" ")


def _read(text: str, block: bool) -> Iterator[str]:
    """The texts of a continuation, the first of which has no number before it."""
    mark = r"^###[^\n]*\n" if block else r"(?:^|(?<=\s))\s*\d{1,3}[.)]\s*(?=\D|$)"
    for n, part in enumerate(re.split(mark, text, flags=re.MULTILINE)):
        lines = part.strip() if block else (part.strip().splitlines() or [""])[0]
        yield lines.strip().strip('"“”').strip() if not (n and not part.strip()) else ""
