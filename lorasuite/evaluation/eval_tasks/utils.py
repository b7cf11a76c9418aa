"""What the task files name with ``!function``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorasuite.evaluation._answers import extract, matches
from lorasuite.evaluation.eval_tasks.sources import load

__all__ = ["extract_answers", "load", "score"]


def extract_answers(
    responses: Iterable[Sequence[str]], documents: Iterable[Mapping[str, Any]]
) -> list[list[str | None]]:
    """lm-eval's filter: each document's outputs to the answers in them."""
    return [
        [extract(output, document["kind"], document["choices"]) for output in outputs]
        for outputs, document in zip(responses, documents, strict=True)
    ]


def score(document: Mapping[str, Any], results: Sequence[Sequence[str | None]]) -> dict[str, float]:
    """Whether the answer is right, and whether there is one."""
    (answer,) = results[0]
    return {
        "exact_match": float(matches(answer, document["answer"], document["kind"])),
        "answered": float(answer is not None),
    }
