"""How a search divides its budget, which arms it begins with, and what it expects of them; no models."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from lorasuite.data import Row, split_rows
from lorasuite.training import EXTENTS, Start
from lorasuite.training._rounds import rounds
from lorasuite.training._search import by_distance, further_arms, learning_spent

ROWS = split_rows([Row(kind="completion", prompt=f"{n} =", completion=f" {n}") for n in range(10)], seed=1)


def spent(plan: list[tuple[int, int]]) -> int:
    return sum(kept * (stop - begin) for (kept, stop), (_, begin) in zip(plan, [(0, 0), *plan], strict=False))


def test_the_budget_is_kept_and_the_last_arm_goes_to_the_end() -> None:
    for arms, steps, budget in itertools.product(
        (1, 2, 3, 7, 18, 24), (1, 2, 6, 15, 57, 1500), (1, 3, 9, 31, 106, 2800)
    ):
        plan = rounds(arms, steps, budget)
        assert spent(plan) <= budget and plan[0][0] <= arms, (arms, steps, budget, plan)
        assert all(fewer[0] <= more[0] and fewer[1] > more[1] for more, fewer in itertools.pairwise(plan))
        assert plan[-1][1] == min(steps, budget) or spent(plan) + steps - plan[-1][1] > budget
    assert rounds(10, 15, 31) == [(10, 1), (4, 2), (2, 6), (1, 15)]
    assert rounds(3, 6, 9) == [(3, 1), (2, 2), (1, 6)]


def test_every_start_has_its_likeliest_rate_first() -> None:
    """A fresh LoRA is no start near the task, whatever the bare base's loss."""
    starts = {
        "fresh": Start(ROWS, 10.0),
        "a": Start(ROWS, 9.0, adapter=Path("a")),
        "b": Start(ROWS, 2.0, adapter=Path("b")),
        "c": Start(ROWS, None, adapter=Path("c")),
        "own": Start(ROWS, 10.0),
    }
    near, probe, far = by_distance(starts, 10.0)
    assert (near, probe, far) == (["b"], "fresh", ["a", "own", "c"])
    found = further_arms(near, far[:2], [1e-3, 3e-4], [1e-2, 3e-3, 1e-3])
    assert found[:5] == [("b", 1e-3), ("a", 1e-2), ("own", 1e-2), ("b", 3e-4), ("a", 3e-3)]
    assert len(found) == 8 and not by_distance({"fresh": Start(ROWS, None)}, None)[0]


@pytest.mark.parametrize(
    ("schedule", "whole", "half"), [("linear", 5.5, 4.0), ("cosine", 5.5, 4.5), ("constant", 10, 5)]
)
def test_the_learning_rate_that_is_spent(schedule: str, whole: float, half: float) -> None:
    assert learning_spent(schedule, 10, 10) == pytest.approx(whole)
    assert learning_spent(schedule, 5, 10) == pytest.approx(half, abs=0.3)


def test_rows_are_held_out_in_turn() -> None:
    """Each row once, and never a row of the teacher's that answers a prompt held out."""
    folds = [ROWS.fold(n) for n in range(5)]
    held = [row.prompt for fold in folds for row in fold.to_choose_by]
    assert sorted(held) == sorted(row.prompt for row in ROWS.own)
    assert all(len(fold.to_train) + len(fold.to_choose_by) == 10 for fold in folds)
    own = [Row(kind="completion", prompt=f"{n} =", completion=" x") for n in range(60)]
    told = [Row(kind="completion", prompt=f"{n} =", completion=" y") for n in range(60)]
    for n in range(5):
        fold = split_rows(own, told, seed=1).fold(n)
        assert len(fold.to_choose_by) == 12 and all(row.completion == " x" for row in fold.to_choose_by)
        assert not {row.prompt for row in fold.to_choose_by} & {row.prompt for row in fold.to_fit}
    read = split_rows(own[:10], (), told[:10], seed=1)
    assert all(row.completion == " x" for n in range(5) for row in read.fold(n).to_train)


def test_what_an_effort_costs() -> None:
    assert {name: extent.budget for name, extent in EXTENTS.items()} == {"normal": 2.5, "thorough": 8}
