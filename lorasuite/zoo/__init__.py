"""Miniature pairs of trained base models with adapters: for the demo, the tests and the benchmarks.

    >>> from lorasuite import zoo
    >>> pair = zoo.pair("llama")
    >>> pair.tasks
    ('mirror', 'drift', 'orbit', 'blend')
    >>> pair.adapter("mirror").name
    'mirror'

The models and how they were made are described in README.md beside this file; ``train.py`` makes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from lorasuite.zoo import lists

__all__ = ["MODELS", "PAIRS", "Pair", "pair", "rows", "texts", "write_rows"]

MODELS: Final = Path(__file__).parent / "models"
"""Where the committed models lie."""

PAIRS: Final[tuple[str, ...]] = ("llama", "neox")
"""Names of the pairs: Llama with all six upgrade factors, GPTNeoX with a fused QKV and one tokenizer."""


@dataclass(frozen=True)
class Pair:
    """An old and a new base model, and the tasks that adapters of the old one were trained on."""

    name: str
    old: Path
    new: Path
    tasks: tuple[str, ...]

    def adapter(self, task: str) -> Path:
        """The adapter of ``task`` for the old base."""
        return self._directory("adapters", task)

    def retrained(self, task: str) -> Path:
        """The same task trained from nothing on the new base: what a migration is compared with."""
        return self._directory("retrained", task)

    def _directory(self, kind: str, task: str) -> Path:
        _check("task", task, self.tasks)
        return self.old.parent / kind / task


def pair(name: str, models: Path = MODELS) -> Pair:
    """The pair called ``name``, from the committed models or from another output of ``train.py``."""
    _check("pair", name, PAIRS)
    return Pair(name, models / name / "old", models / name / "new", tuple(lists.TASKS))


def rows(pair: str, task: str, split: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """``count`` different rows ``{"prompt", "completion"}`` of a task; the text is ``prompt + completion``.

    The splits ``train``, ``validation`` and ``test`` never share a list: a list's content decides its split.
    Fewer rows with the same seed are a prefix of more. Every word is in both vocabularies of the pair.
    """
    _check("pair", pair, PAIRS)
    _check("task", task, tuple(lists.TASKS))
    found: dict[str, dict[str, str]] = {}
    for row in lists.examples([(task,)], split, seed):
        if len(found) >= count:
            break
        found.setdefault(row["prompt"], row)
    return list(found.values())


def texts(pair: str, count: int, seed: int = 0) -> list[str]:
    """``count`` calibration texts: what both bases of the pair were trained on, nothing of the new tasks."""
    _check("pair", pair, PAIRS)
    found = lists.examples(lists.PROGRAMS, "train", seed)
    return [row["prompt"] + row["completion"] for row in islice(found, count)]


def write_rows(rows: Iterable[Mapping[str, str]], path: Path) -> None:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _check(kind: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}; choose one of {', '.join(known)}")
