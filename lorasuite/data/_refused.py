"""Conversations that a chat template refuses, told apart from those it renders."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lorasuite.bases import beyond_limits
from lorasuite.data._rows import Message, Row, chat_renderings
from lorasuite.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Stands for the answer of a prompt that has none yet.
_ANSWER = Message("assistant", "-")


def accepted(rows: Sequence[Row], tokenizers: Sequence[PreTrainedTokenizerBase]) -> tuple[list[Row], list[Problem]]:
    """The rows that the chat template of each tokenizer renders, and a problem with its place for each other.

    A prompt without an answer is rendered with one. Where a template does not end, no row is kept, and the problems are
    those of :func:`endless`.
    """
    kept: list[Row] = []
    problems = endless(rows, tokenizers)
    if problems:
        return kept, problems
    for row in rows:
        try:
            for tokenizer in tokenizers if row.kind == "messages" else ():
                _answered(row).target(tokenizer)
        except DataError as error:
            problems += error.problems
        else:
            kept.append(row)
    return kept, problems


def _answered(row: Row) -> Row:
    if row.messages and row.messages[-1].role == "assistant":
        return row
    return replace(row, messages=(*row.messages, _ANSWER))


def endless(rows: Sequence[Row], tokenizers: Sequence[PreTrainedTokenizerBase]) -> list[Problem]:
    """Chat templates that take too long or write too much, each with the first conversation that it does so for."""
    conversations = [_answered(row) for row in rows if row.kind == "messages"]
    found = [problem for tokenizer in tokenizers for problem in _endless(conversations, tokenizer)]
    return list(dict.fromkeys(found))


def _endless(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[Problem]:
    """Those of one tokenizer: of several by name each is tried with the rows that transformers takes it for."""
    from transformers import PreTrainedTokenizerBase as Known

    # Others render by code of their own.
    if type(tokenizer).apply_chat_template is not Known.apply_chat_template or tokenizer.chat_template is None:
        return
    by_template: dict[str, list[Row]] = {}
    for row in rows:
        with contextlib.suppress(ValueError):  # none of several is for it: that refuses it where it is rendered
            by_template.setdefault(tokenizer.get_chat_template(tools=row.extra.get("tools") or None), []).append(row)
    for template, members in by_template.items():
        values = [(row, given) for row in members for given in chat_renderings(row, tokenizer)]
        if found := beyond_limits(template, [given for _, given in values]):
            row = values[found[0]][0]
            what = f"the chat template of {tokenizer.name_or_path or 'the base'} {found[1]} for it"
            yield Problem(row.where or "messages row", what, "Mend the template, or leave the row out.")
