"""Prompts that the old base writes itself, between the words with which given ones begin and end."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lorasuite.data import Row, unanswered
from lorasuite.errors import DataError, Problem
from lorasuite.teacher._generation import generator
from lorasuite.teacher._settings import ATTEMPTS_PER_ROW, TeacherSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorasuite.teacher._vllm import VLLMTeacher

#: Sampling temperature of prompts that the old base writes.
PROMPT_TEMPERATURE = 1.0
#: Beginnings that are gone on with, where few prompts are wanted.
FEWEST_ATTEMPTS = 32


def frame(prompts: Sequence[str]) -> tuple[str, str]:
    """The words with which all prompts begin, and those with which all end, with the blanks around what differs.

    Both empty for fewer than two prompts, and where the prompts do not end alike: then nothing says where one is over.
    """
    if len(set(prompts)) < 2:
        return "", ""
    split = [re.findall(r"\s*\S+", prompt.rstrip()) for prompt in prompts]
    shortest = min(len(words) for words in split)
    ahead = _alike(split, shortest - 1)
    behind = _alike([words[::-1] for words in split], shortest - 1 - ahead)
    last = split[0]
    trail = prompts[0][len(prompts[0].rstrip()) :]
    return ("".join(last[:ahead]), "".join(last[len(last) - behind :]) + trail) if behind else ("", "")


def prompt_frame(prompts: Iterable[Row]) -> tuple[str, str]:
    """The :func:`frame` of prompts that can be imitated: completion and instruction rows.

    Raises:
        DataError: if they have none.
    """
    begin, end = frame(_texts(prompts))
    if not end:
        remedy = "Give two or more completion or instruction rows that end alike, or teacher.prefix and teacher.suffix"
        raise DataError([Problem("teacher.imitate", "the prompts have no common end to stop at", remedy)])
    return begin, end


def distinct_prompts(rows: Sequence[Row], words: int) -> list[Row]:
    """The prompts of rows without their answers, each once.

    Args:
        rows: of any kind.
        words: how many of a text row's words are its prompt.
    """
    return list(dict.fromkeys(unanswered(row, words) for row in rows))


def imitate(
    model: PreTrainedModel | PeftModel | VLLMTeacher,
    tokenizer: PreTrainedTokenizerBase,
    given: Sequence[Row],
    count: int,
    settings: TeacherSettings,
    *,
    seed: int = 0,
) -> list[Row]:
    """New prompts: the old base, without its adapter, goes on from the given ones' beginning until their end.

    In the way of Magpie (arXiv 2406.08464), which lets a chat model go on from its template. The adapter is off: it was
    trained to answer prompts, not to write them. Conversations and running text are not imitated.

    Args:
        model: the old base, with or without an adapter.
        tokenizer: the old base's.
        given: prompts, for their frame where the settings name none.
        count: how many new ones.
        settings: of the teacher.
        seed: of the sampling.

    Returns:
        at most ``count`` completion rows, each prompt once, none of the given ones among them; fewer where the base
        does not reach the end, or repeats itself.

    Raises:
        DataError: if prompts are not alike, or none of the new ones comes to its end.
    """
    if count <= 0:
        return []
    begin, end = (settings.prefix, settings.suffix) if settings.suffix else prompt_frame(given)
    writer = generator(model, tokenizer, settings, PROMPT_TEMPERATURE, f"{seed} prompts")
    known, found = set(_texts(given)), list[Row]()
    ends = {row.end_of_answer for row in given}
    ending = ends.pop() if len(ends) == 1 else ""
    limit, at_once = max(ATTEMPTS_PER_ROW * count, FEWEST_ATTEMPTS), max(count, settings.batch_size)
    off = model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()
    with off:
        for start in range(0, limit, at_once):
            if len(found) >= count:
                break
            numbers = range(start, min(start + at_once, limit))  # what is tried does not depend on the batch
            beginnings = [writer.prompt(n, Row(kind="text", text=begin)) for n in numbers]
            answers = {answer.prompt.number: answer.text for batch in writer.generate(beginnings) for answer in batch}
            for number in sorted(answers):
                middle, stop, _ = answers[number].partition(end)
                text = begin + middle + end
                if stop and middle.strip() and text not in known:
                    known.add(text)
                    found.append(Row(kind="completion", prompt=text, end_of_answer=ending))
    if not found:
        what = f"of {limit} prompts the old base began, none came to {end.strip()!r}"
        raise DataError([Problem("teacher.imitate", what, "Give more prompts (--prompts) instead")])
    return found[:count]


def _texts(prompts: Iterable[Row]) -> list[str]:
    return [row.prompt_and_completion()[0] for row in prompts if row.kind in ("completion", "instruction")]


def _alike(lists: Sequence[Sequence[str]], longest: int) -> int:
    """How many first elements all lists share, at most ``longest``."""
    count = 0
    while count < longest and len({words[count] for words in lists}) == 1:
        count += 1
    return count
