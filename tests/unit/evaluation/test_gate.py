"""Verdicts from measured arms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from lorasuite.evaluation import (
    Arm,
    Comparison,
    EvaluationSummary,
    Gate,
    Served,
    TaskSummary,
    as_served,
    compare,
    fails,
    judge,
)
from tests.records import scored, task_score


def arms(metric: str, **values: float) -> dict[Arm, EvaluationSummary]:
    names = {"old": Arm.OLD_ADAPTER, "new": Arm.NEW, "moved": Arm.MIGRATED, "tuned": Arm.MIGRATED_LFT}
    if metric == "bits_per_byte":
        return {names[name]: scored(bits=value) for name, value in values.items()}
    return {names[name]: scored(value) for name, value in values.items()}


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
    both = {arm: scored(0.0, bits) for arm, bits in {Arm.OLD_ADAPTER: 1.0, Arm.NEW: 2.0, Arm.MIGRATED: 1.0}.items()}
    assert judge(both, {}).metric == "bits_per_byte"
    assert judge(both, {}, Gate(metric="exact_match")).verdict == "retrain"


@pytest.mark.parametrize("moved, verdict", [(0.85, "ship"), (0.8, "retrain")])
def test_a_new_base_that_needs_no_adapter(moved: float, verdict: str) -> None:
    found = judge(arms("exact_match", old=0.7, new=0.8, moved=moved), {})
    assert found.verdict == verdict and found.kept is None and "needs no adapter" in found.reason


def test_tasks_and_nothing() -> None:
    def score(value: float) -> dict[str, TaskSummary]:
        return {"t": task_score("t", {"word_perplexity,none": 9.0, "acc,none": 0.1, "acc_norm,none": value})}

    tasks = {Arm.OLD_ADAPTER: score(0.6), Arm.NEW: score(0.2), Arm.MIGRATED: score(0.5)}
    found = judge({}, tasks)
    assert (found.metric, found.verdict) == ("tasks", "needs-finetune") and found.kept == pytest.approx(0.75)
    assert judge({}, {}).verdict == "unmeasured"
    assert judge({}, {}, Gate(metric="exact_match")).verdict == "unmeasured"


def compared(other: str, low: float, high: float, flips: int = 0, right: int = 100, **more: Any) -> Comparison:
    content: dict[str, Any] = {
        "first": other, "second": "migrated", "task": None, "metric": "exact_match", "interval": (low, high), "n": 200,
        "first_score": 0.5, "second_score": 0.5, "difference": 0.0, "mcnemar_p": None, "both_wrong": 0,
        "negative_flips": [str(i) for i in range(flips)], "positive_flips": [], "both_right": right, "examples": [],
    }  # fmt: skip
    return Comparison.model_validate({**content, **more})


SCORES = {"old": 0.7, "new": 0.2, "moved": 0.68}


def test_by_the_lower_end_of_the_interval() -> None:
    found = arms("exact_match", **SCORES)
    near, wide = compared("old+adapter", -0.04, 0.01), compared("old+adapter", -0.1, 0.06)
    sure = Gate(lower_bound=True)
    assert judge(found, {}, sure, [near]).verdict == "ship"
    missed = judge(found, {}, sure, [wide])
    assert missed.verdict == "needs-finetune" and missed.kept_interval == pytest.approx((0.8, 1.12))
    assert "by the lower bound" in missed.reason
    assert judge(found, {}, None, [wide]).verdict == "ship", "the estimate counts unless asked otherwise"
    assert judge(found, {}, sure, []).verdict == "needs-finetune", "nobody measured the interval"
    # the comparison of another metric or arm is not taken for it
    assert judge(found, {}, sure, [near.model_copy(update={"metric": "bits_per_byte"})]).verdict == "needs-finetune"


def test_fewer_bits_and_their_interval() -> None:
    found = arms("bits_per_byte", old=1.0, new=2.0, moved=1.05)
    worse = compared("old+adapter", 0.02, 0.08, metric="bits_per_byte")
    judged = judge(found, {}, Gate(lower_bound=True), [worse])
    assert judged.verdict == "ship" and judged.kept_interval == pytest.approx((0.92, 0.98))


def test_a_gain_over_the_bare_base_and_a_bound_on_flips() -> None:
    found = arms("exact_match", **SCORES)
    against = [compared("old+adapter", -0.1, 0.1, flips=10, right=90), compared("new", 0.3, 0.6)]
    assert judge(found, {}, Gate(min_gain_over_bare=0.4, max_negative_flips=0.1), against).verdict == "ship"
    few = judge(found, {}, Gate(max_negative_flips=0.05), against)
    assert few.verdict == "needs-finetune" and few.checks[-1].value == pytest.approx(0.1)
    assert "right before and wrong now" in few.reason
    assert judge(found, {}, Gate(min_gain_over_bare=0.5), against).verdict == "needs-finetune"
    by_bound = Gate(ship=0.5, lower_bound=True, min_gain_over_bare=0.31)
    assert judge(found, {}, by_bound, against).verdict == "needs-finetune"
    # where nothing is right or wrong, flips cannot be bounded
    assert judge(found, {}, Gate(max_negative_flips=1), []).verdict == "needs-finetune"


def test_single_tasks() -> None:
    def scores(first: float, second: float) -> dict[str, TaskSummary]:
        return {n: task_score(n, {"acc,none": v}, n=200) for n, v in {"a": first, "b": second}.items()}

    tasks = {Arm.OLD_ADAPTER: scores(0.8, 0.8), Arm.NEW: scores(0.2, 0.2), Arm.MIGRATED: scores(0.8, 0.5)}
    assert judge({}, tasks, Gate(ship=0.7)).verdict == "ship", "the mean"
    each = judge({}, tasks, Gate(ship=0.7, tasks={"a": {}}))
    assert (each.verdict, each.task) == ("needs-finetune", "b") and len(each.checks) == 2
    assert judge({}, tasks, Gate(ship=0.7, tasks={"b": {"ship": 0.49}})).verdict == "ship"
    gone = judge({}, tasks, Gate(tasks={"c": {}}))
    assert gone.verdict == "unmeasured" and "c" in gone.reason
    with pytest.raises(ValueError, match="shp"):
        Gate(tasks={"a": {"shp": 0.5}})


def test_a_group_does_not_count_beside_its_tasks() -> None:
    def scores(value: float) -> dict[str, TaskSummary]:
        single = {name: task_score(name, {"acc": value}) for name in ("a", "b")}
        return {**single, "both": task_score("both", {"acc": 0.0}, group=True)}

    tasks = {Arm.OLD_ADAPTER: scores(0.8), Arm.NEW: scores(0.2), Arm.MIGRATED: scores(0.8)}
    assert judge({}, tasks).migrated == pytest.approx(0.8)
    assert [check.task for check in judge({}, tasks, Gate(tasks={"a": {}})).checks] == ["a", "b"]


def test_what_fails_a_run() -> None:
    assert [fails(v, "needs-finetune") for v in ("ship", "needs-finetune", "retrain", "unmeasured", "failed")] == [
        False, True, True, True, True,
    ]  # fmt: skip
    assert not fails("needs-finetune", "retrain")


FEW = {"old": 0.9, "new": 0.1, "moved": 0.9}


@pytest.mark.parametrize("metric", ["exact_match", "bits_per_byte"])
@pytest.mark.parametrize("n", [1, 8, 29])
def test_nothing_ships_on_few_rows(metric: str, n: int) -> None:
    """Whatever the mean and however narrow the interval: with the lead, and where there was none to keep."""
    for values in (FEW, {"old": 0.1, "new": 0.2, "moved": 0.9}):
        values = values if metric == "exact_match" else {name: 1 - value for name, value in values.items()}
        results = {arm: one.model_copy(update={"n": n}) for arm, one in arms(metric, **values).items()}
        gain = 0.8 if metric == "exact_match" else -0.8
        narrow = [compared(arm, gain, gain, metric=metric, n=n) for arm in ("old+adapter", "new")]
        for comparisons in ([], narrow):
            assert judge(results, {}, None, comparisons).verdict != "ship"
        assert judge(results, {}, None, narrow).verdict == "unmeasured"
        assert "30 rows or more" in judge(results, {}, None, narrow).reason
        assert judge(results, {}, Gate(min_rows=1), narrow).verdict == "ship"


def test_on_few_rows_the_interval_decides() -> None:
    results = {arm: one.model_copy(update={"n": 40}) for arm, one in arms("exact_match", **FEW).items()}
    assert judge(results, {}).verdict == "needs-finetune", "no interval was measured"
    assert judge(results, {}, None, [compared("old+adapter", -0.05, 0.05)]).verdict == "ship"
    assert judge(results, {}, None, [compared("old+adapter", -0.2, 0.1)]).verdict == "needs-finetune"
    assert judge(results, {}, Gate(interval_below=40), [compared("old+adapter", -0.2, 0.1)]).verdict == "ship"
    worse = {**results, Arm.MIGRATED: results[Arm.MIGRATED].model_copy(update={"exact_match": 0.2})}
    assert judge(worse, {}, None, [compared("old+adapter", -0.8, -0.5)]).verdict == "needs-finetune"
    assert judge(worse, {}, None, [compared("old+adapter", -0.8, -0.7)]).verdict == "retrain"


def test_the_power_of_the_rows_is_told() -> None:
    """20 of 200 answers differ: a difference of 6 points is seen four times in five (s = √0.1/√200, 2.8·s)."""
    rng = np.random.default_rng(0)
    flips = rng.permutation(200)[:20]
    first = [{"index": i, "target": "t", "exact_match": bool(i not in flips[:10])} for i in range(200)]
    second = [{"index": i, "target": "t", "exact_match": bool(i not in flips[10:])} for i in range(200)]
    pair = compare(first, second, names=("old+adapter", "migrated"))
    found = judge(arms("exact_match", old=0.95, new=0.1, moved=0.95), {}, None, [pair])
    assert found.rows == 200 and found.detectable == pytest.approx(2.8 * (0.1 / 200) ** 0.5, rel=0.05)
    assert "200 rows tell differences of 6" in found.reason


@pytest.mark.parametrize(
    "wrong", [{"ship": math.nan}, {"ship": math.inf}, {"finetune": 0.95}, {"tasks": {"a": {"ship": 0.1}}}]
)
def test_thresholds_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Gate.model_validate(wrong)


def test_what_is_served_has_to_be_what_was_measured() -> None:
    """A loader that was run decides; one of which the rules were read, or which only cannot merge, does not."""
    good = judge(arms("exact_match", old=0.7, new=0.2, moved=0.75), {})
    assert good.verdict == "ship"
    served = {"peft": Served(ok=True, ran=True), "vllm": Served(ok=False, problems=["DoRA is not supported"])}
    assert as_served(good, served) == good
    served["transformers"] = Served(ok=False, ran=True, problems=["it loads, and answers as the base does"])
    found = as_served(good, served)
    assert found.verdict == "unmeasured" and "transformers: it loads, and answers as the base does" in found.reason
    assert fails(found.verdict, "retrain")
    bad = judge(arms("exact_match", old=0.7, new=0.2, moved=0.2), {})
    assert as_served(bad, served) == bad
    # what was asked for and is not there changes no verdict, and is said
    lacking = as_served(good, {"llama.cpp": Served(ok=True, not_run="its converter is not found")})
    assert lacking.verdict == "ship"
    assert lacking.reason == f"{good.reason}; not run as asked for (llama.cpp: its converter is not found)"
