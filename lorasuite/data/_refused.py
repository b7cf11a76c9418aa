"""Conversations that a chat template refuses, told apart from those it renders."""

from __future__ import annotations

from collections.abc import Sequence
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

    A prompt without an answer is rendered with one. Where the template of any does not end, no row is rendered by it.

    Raises:
        DataError: for such a template, with the row.
    """
    kept: list[Row] = []
    problems: list[Problem] = []
    conversations = [_answered(row) for row in rows if row.kind == "messages"]
    for tokenizer in tokenizers:
        _check_ends(conversations, tokenizer)
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


def _check_ends(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    """See that a chat template ends for every row; of several by name the one that transformers takes for it.

    Raises:
        DataError: if it takes too long for one, or writes too much.
    """
    from transformers import PreTrainedTokenizerBase as Known

    # Others render by code of their own.
    if type(tokenizer).apply_chat_template is not Known.apply_chat_template or tokenizer.chat_template is None:
        return
    by_template: dict[str, list[Row]] = {}
    for row in rows:
        by_template.setdefault(tokenizer.get_chat_template(tools=row.extra.get("tools") or None), []).append(row)
    for template, members in by_template.items():
        values = [(row, given) for row in members for given in chat_renderings(row, tokenizer)]
        if found := beyond_limits(template, [given for _, given in values]):
            row = values[found[0]][0]
            what = f"the chat template of {tokenizer.name_or_path or 'the base'} {found[1]} for it"
            raise DataError(Problem(row.where or "messages row", what, "Mend the template, or leave the row out."))
