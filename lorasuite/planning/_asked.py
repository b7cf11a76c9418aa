"""What the old base with the adapter is to answer, checked before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorasuite.adapters import sources
from lorasuite.data import Row, Template, accepted, read_prompts, unanswered
from lorasuite.errors import Problem, grouped
from lorasuite.planning._config import MigrationConfig
from lorasuite.planning._inspection import Inspection
from lorasuite.planning._policy import RowCounts, RowPlan
from lorasuite.teacher import Card, card_texts, prompt_frame, prompt_source, unusable


def teacher_prompts(
    result: Inspection, config: MigrationConfig, wanted: RowPlan, template: Template
) -> list[Row] | None:
    """What the old base with the adapter is to answer; None where nobody says."""
    if config.teacher.engine == "vllm":
        result.problems += unusable(config.loading.quantized)
    tokenizer = result.old_reader
    if tokenizer is not None and tokenizer.eos_token_id is None:
        result.problems.append(
            Problem(
                config.old_base, "its tokenizer has no EOS token", "The teacher's rows need one to end with: set it."
            )
        )
    source = config.prompt_data
    if source is None:
        return None
    rows: list[Row] = result.attempt(lambda: read_prompts(source, config.renamed_columns, template)) or []
    if getattr(tokenizer, "chat_template", None) is not None:
        rows = usable_rows(result, config, "prompts", rows, [tokenizer, result.new_tokenizer])
    words = config.teacher.text_prefix
    distinct = set()
    for number, row in enumerate(rows, start=1):
        prompt = unanswered(row, words)
        if prompt in distinct:
            continue
        distinct.add(prompt)
        if tokenizer is not None and row.kind == "messages" and getattr(tokenizer, "chat_template", None) is None:
            what = f"prompt {number} is a conversation, and there is no chat template of the old base or the adapter"
            result.problems.append(Problem(source, what, "Use rows of prompt and completion."))
            break
    fewer = len(distinct) < wanted.teacher_rows
    if rows and fewer and config.teacher.imitate and not config.teacher.suffix:
        result.attempt(lambda: prompt_frame(distinct))
    return rows or None


def adapter_card(result: Inspection, config: MigrationConfig) -> tuple[str, str]:
    """The adapter's card and its training settings; of several adapters, none are those of their sum."""
    if result.opened is None or len(sources(config.adapter)) != 1:
        return "", ""
    return card_texts(result.opened.path)


def check_sources(result: Inspection, config: MigrationConfig, rows: RowPlan, counts: RowCounts, card: Card) -> None:
    """Sources of prompts that are named, and for which nothing is given; and what of the adapter's card or of its chat
    template is not used."""
    old, new = (getattr(reader, "chat_template", None) for reader in (result.old_reader, result.new_tokenizer))
    if old and not new and result.new_tokenizer is not None and rows.prompt_sources and not counts.prompts:
        result.notices.append(
            "the new base has no chat template: prompts are not looked for as conversations, which the old one's "
            "chat template renders"
        )
    if card.unread and rows.prompt_sources:
        result.notices.append("the adapter's card begins with YAML that cannot be read: widget examples are not used")
    if card.left_out and rows.prompt_sources:
        what = "that cannot be read as a prompt or a template, and are not used"
        result.notices.append(f"snippets of the adapter's card {what}: {card.left_out}")
    for name in rows.prompt_sources:
        there = {"examples": bool(counts.prompts), "description": bool(config.describe), "card": counts.card}
        if not there.get(name, True):
            what = f"{name} needs {prompt_source(name).needs}"
            result.problems.append(Problem("prompt_sources", what, "Give that, or leave this source out."))


def usable_rows(
    result: Inspection, config: MigrationConfig, subject: str, rows: list[Row], tokenizers: Sequence[Any]
) -> list[Row]:
    """The rows that every chat template renders; the others are problems, or said in a notice if the user allows it and
    some are left."""
    known_tokenizers = [tokenizer for tokenizer in tokenizers if tokenizer is not None]
    kept, problems = accepted(rows, known_tokenizers)
    if not problems:
        return rows
    if config.skip_refused_rows and kept:
        first = grouped(problems)[0]
        left_out = f"{len(rows) - len(kept)} of {len(rows)} left out"
        result.notices.append(f"{subject}: {left_out}, such as {first.where}: {first.what}")
        return kept
    known = set(result.problems)
    result.problems += [problem for problem in problems if problem not in known]
    return kept
