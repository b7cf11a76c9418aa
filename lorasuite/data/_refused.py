"""Conversations that a chat template refuses, told apart from those it renders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lorasuite.data._rows import Message, Row
from lorasuite.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Stands for the answer of a prompt that has none yet.
_ANSWER = Message("assistant", "-")


def accepted(rows: Sequence[Row], tokenizers: Sequence[PreTrainedTokenizerBase]) -> tuple[list[Row], list[Problem]]:
    """The rows that the chat template of each tokenizer renders, and a problem with its place for each other.

    A prompt without an answer is rendered with one.
    """
    kept: list[Row] = []
    problems: list[Problem] = []
    for row in rows:
        whole = row
        if row.kind == "messages" and (not row.messages or row.messages[-1].role != "assistant"):
            whole = replace(row, messages=(*row.messages, _ANSWER))
        try:
            for tokenizer in tokenizers if row.kind == "messages" else ():
                whole.target(tokenizer)
        except DataError as error:
            problems += error.problems
        else:
            kept.append(row)
    return kept, problems
