"""Verdicts from measured arms."""

from __future__ import annotations

from typing import Any

import pytest

from lorasuite.gate import Gate, judge


def arms(metric: str, **values: float) -> dict[str, dict[str, Any]]:
    names = {"old": "old+adapter", "new": "new", "moved": "migrated", "tuned": "migrated+lft"}
    return {names[name]: {metric: value} for name, value in values.items()}


@pytest.mark.parametrize(
    "moved, verdict, kept",
    [(0.75, "ship", 1.1), (0.66, "ship", 0.92), (0.4, "needs-finetune", 0.4), (0.2, "retrain", 0)],
)
def test_shares_of_the_lead(moved: float, verdict: str, kept: float) -> None:
    found = judge(arms("exact_match", old=0.7, new=0.2, moved=moved), {})
    assert found.verdict == verdict and found.kept == pytest.approx(kept)
    assert f"{100 * kept:.0f} % of the lead" in found.reason


def test_the_published_arm_counts() -> None:
    found = judge(arms("exact_match", old=0.7, new=0.2, moved=0.2, tuned=0.7), {})
    assert (found.verdict, found.arm) == ("ship", "migrated+lft")


def test_fewer_bits_are_better() -> None:
    assert judge(arms("bits_per_byte", old=1.0, new=2.0, moved=1.05), {}).verdict == "ship"
    assert judge(arms("bits_per_byte", old=1.0, new=2.0, moved=2.5), {}).verdict == "retrain"


def test_an_exact_match_that_is_nowhere_decides_nothing() -> None:
    both = {
        arm: {"exact_match": 0.0, "bits_per_byte": bits}
        for arm, bits in {"old+adapter": 1.0, "new": 2.0, "migrated": 1.0}.items()
    }
    assert judge(both, {}).metric == "bits_per_byte"
    assert judge(both, {}, Gate(metric="exact_match")).verdict == "retrain"


@pytest.mark.parametrize("moved, verdict", [(0.85, "ship"), (0.8, "retrain")])
def test_a_new_base_that_needs_no_adapter(moved: float, verdict: str) -> None:
    found = judge(arms("exact_match", old=0.7, new=0.8, moved=moved), {})
    assert found.verdict == verdict and found.kept is None and "needs no adapter" in found.reason


def test_tasks_and_nothing() -> None:
    def score(value: float) -> dict[str, Any]:
        return {"t": {"metrics": {"word_perplexity,none": 9.0, "acc,none": 0.1, "acc_norm,none": value}}}

    tasks = {"old+adapter": score(0.6), "new": score(0.2), "migrated": score(0.5)}
    found = judge({}, tasks)
    assert (found.metric, found.verdict) == ("tasks", "needs-finetune") and found.kept == pytest.approx(0.75)
    assert judge({}, {}).verdict == "unmeasured"
    assert judge({}, {}, Gate(metric="exact_match")).verdict == "unmeasured"
