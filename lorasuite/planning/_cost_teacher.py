"""What the stages need in which the old base with the adapter is asked: for prompts, for rows, and of their tokens."""

from __future__ import annotations

from lorasuite.planning._cost import FLOAT, Cost, Ops, Shape, Work, pass_ops, scoring, writing
from lorasuite.teacher import MOST_JUDGED, asked_for
from lorasuite.training import OUTCOMES_KEPT

#: Bytes that soft labels have of a token: outcomes and their log-probabilities, the token, its unit and that one's.
SOFT_BYTES = 8 * OUTCOMES_KEPT + 16


def teacher_costs(old: Shape, new: Shape, work: Work) -> list[Cost]:
    """What every stage needs that comes before there are rows to train on, in the order they run."""
    found: list[Cost] = []
    if work.teacher_rows and work.prompt_sources:
        found += [prompt_drafts(old, work), prompts(old, work)]
    if work.teacher_rows:
        found += [teacher(old, work), teacher_worth(old, new, work)]
    if work.synthetic_rows and work.soft_labels:
        found.append(soft_labels(old, work))
    if work.synthetic_rows and work.token_weights:
        found.append(token_weights(old, work))
    return found


def template_fit(old: Shape, work: Work) -> Cost:
    """The losses of the old base, with and without its adapter, on a few rows under every template that is tried."""
    ops, held = scoring(old, work, work.fitted_rows, work.run_item)
    return Cost("template_fit", ops * 2, **work.held(held))


def prompt_drafts(old: Shape, work: Work) -> Cost:
    """Drafts of prompts from every source: lists that the old base goes on with, prompts begun like others, and for
    each draft an answer with the adapter and the losses on it of the old base with and without.

    For 300 rows a source writes some 43,000 tokens, more where examples are long, and up to 1,350 drafts are probed.
    """
    prompt = work.prompt_tokens
    told = asked_for(work.teacher_rows, prompt if work.examples else 0)
    ops, held = writing(old, work, told.lists, told.shown * prompt, told.list_tokens)
    ops += writing(old, work, told.varied, prompt / 2, told.varied_tokens)[0]
    ops += _probing(old, work, told.probed, told.answer_tokens)
    return Cost("prompt_drafts", ops * work.prompt_sources, **work.held(held))


def prompts(old: Shape, work: Work) -> Cost:
    """The signal on general texts, and the states of the drafts that are chosen among by their distances."""
    told = asked_for(work.teacher_rows)
    ops = _probing(old, work, told.general, told.answer_tokens)
    ops += pass_ops(old, told.pool * work.prompt_tokens, work.prompt_tokens)
    _, held = writing(old, work, told.general, work.prompt_tokens, told.answer_tokens)
    return Cost("prompts", ops, **work.held(held, FLOAT * told.pool * old.dims.hidden_size))


def _probing(old: Shape, work: Work, rows: float, answer: float) -> Ops:
    """Answers of at most so many tokens to so many prompts, and two passes over both."""
    answer = min(work.teacher_tokens, answer)
    tokens = work.prompt_tokens + answer
    written, _ = writing(old, work, rows, work.prompt_tokens, answer)
    return written + pass_ops(old, rows * tokens, tokens, rows * answer) * 2


def teacher(old: Shape, work: Work) -> Cost:
    """Rows the old base writes with its adapter."""
    ops, held = writing(old, work, work.teacher_rows, work.row_tokens, work.teacher_tokens)
    return Cost("teacher", ops, **work.held(held))


def teacher_worth(old: Shape, new: Shape, work: Work) -> Cost:
    """The loss of the new base on some of the written rows, and the old one's with and without its adapter."""
    first, held = scoring(old, work, min(work.teacher_rows, MOST_JUDGED), work.run_item)
    second, other = scoring(new, work, min(work.teacher_rows, MOST_JUDGED), work.run_item)
    return Cost("teacher_worth", first * 2 + second, **work.held(max(held, other)))


def soft_labels(old: Shape, work: Work) -> Cost:
    """The teacher's likeliest next tokens at every label of the training rows: one pass, and what is kept of each."""
    ops, held = scoring(old, work, work.rows, work.run_item)
    kept = SOFT_BYTES * work.rows * work.row_tokens
    return Cost("soft_labels", ops + Ops(written=kept), **work.held(held, 2 * kept), disk=kept)


def token_weights(old: Shape, work: Work) -> Cost:
    """The losses of the old base, with and without its adapter, on the rows that it wrote."""
    ops, held = scoring(old, work, work.synthetic_rows, work.run_item)
    return Cost("token_weights", ops * 2, **work.held(held), disk=16 * work.synthetic_rows * work.row_tokens)
