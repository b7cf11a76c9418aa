"""What adapters cost of general ability: counted, judged, and on which texts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lorasuite.errors import DataError
from lorasuite.evaluation import Arm, Gate, General, GeneralCost, GeneralSettings, general_cost, held_out_texts, judge
from tests.records import scored


def texts(bits: float, n: int = 40, spread: float = 0.0) -> list[dict[str, Any]]:
    """Samples of 10 bytes each at so many bits per byte, half of them ``spread`` above and half below."""
    return [
        {"index": i, "target": f"t{i}", "bytes": 10, "loglikelihood": -10 * math.log(2) * (bits + spread * (-1) ** i)}
        for i in range(n)
    ]


def answers(right: int, n: int = 10) -> list[dict[str, Any]]:
    return [
        {"task": "t", "index": i, "target": "", "scores": {"acc,none": float(i < right), "size,none": 1.0}}
        for i in range(n)
    ]


def cost(excess: float, interval: tuple[float, float] | None = (-1.0, 1.0), task: str | None = None) -> General:
    one = GeneralCost(
        task=task, metric="bits_per_byte", arm=Arm.MIGRATED, n=64, old=0.1, new=0.1 + excess, excess=excess,
        interval=interval,
    )  # fmt: skip
    return General(costs=[one])


SHIPS = {Arm.OLD_ADAPTER: scored(0.7), Arm.NEW: scored(0.2), Arm.MIGRATED: scored(0.69)}


def test_each_adapter_is_set_against_its_own_base() -> None:
    """A better base hides nothing: what counts is what each adapter takes from the base it is on."""
    arms = {
        Arm.OLD: texts(2.0),
        Arm.OLD_ADAPTER: texts(2.1),
        Arm.NEW: texts(1.0),
        Arm.MIGRATED_LFT: texts(1.3, spread=0.1),
    }
    found = general_cost(None, {**arms, Arm.MIGRATED: texts(9.0)})
    assert found is not None and found.arm == Arm.MIGRATED_LFT and found.metric == "bits_per_byte" and found.n == 40
    assert (found.old, found.new, found.excess) == pytest.approx((0.1, 0.3, 0.2))
    assert found.interval is not None and 0.1 < found.interval[0] < 0.2 < found.interval[1] < 0.3
    with pytest.raises(DataError, match="in one of them only"):
        general_cost(None, {**arms, Arm.NEW: texts(1.0, n=39)})


def test_a_lower_score_is_a_cost() -> None:
    arms = {Arm.OLD: answers(8), Arm.OLD_ADAPTER: answers(7), Arm.NEW: answers(9), Arm.MIGRATED: answers(4)}
    found = general_cost("t", arms)
    assert found is not None and found.metric == "acc,none"
    assert (found.old, found.new, found.excess) == pytest.approx((0.1, 0.5, 0.4))
    assert found.interval is not None and found.interval[0] <= 0.4 <= found.interval[1] and found.interval[1] > 0
    plain = {
        arm: [{**one, "scores": {"word_perplexity,none": 3.0}} for one in samples] for arm, samples in arms.items()
    }
    assert general_cost("t", plain) is None, "lower is better there"


@pytest.mark.parametrize(
    "excess, gate, verdict",
    [
        (0.04, {}, "ship"),
        (-0.3, {}, "ship"),
        (0.06, {}, "needs-finetune"),
        (0.06, {"max_general_loss": 0.1}, "ship"),
        (9.0, {"max_general_loss": None}, "ship"),
        (0.04, {"general_required": True}, "ship"),
    ],
)
def test_the_gate_bounds_what_the_new_adapter_costs_beyond_the_old_one(
    excess: float, gate: dict[str, Any], verdict: str
) -> None:
    found = judge(SHIPS, {}, Gate(**gate), (), cost(excess))
    assert found.verdict == verdict and "of general text, the old one 0.1" in found.reason
    checked = [check for check in found.checks if check.name.startswith("bits per byte of general text")]
    assert [check.passed for check in checked] == (
        [] if gate.get("max_general_loss", 0) is None else [verdict == "ship"]
    )
    assert ("missed bits per byte" in found.reason) == (verdict != "ship")


def test_by_the_bound_the_upper_end_counts() -> None:
    held = {"ship": 0.0, "finetune": 0.0, "lower_bound": True}

    def passed(general: General) -> bool:
        return judge(SHIPS, {}, Gate.model_validate(held), (), general).checks[-1].passed

    assert passed(cost(0.0, (-0.04, 0.04))) and not passed(cost(0.0, (-0.06, 0.06))) and not passed(cost(0.0, None))


def test_a_task_has_a_limit_of_its_own() -> None:
    assert judge(SHIPS, {}, None, (), cost(0.09, task="t")).verdict == "ship"
    found = judge(SHIPS, {}, None, (), cost(0.2, task="t"))
    assert found.verdict == "needs-finetune" and "30 points of t, the old one 10" in found.reason
    assert judge(SHIPS, {}, Gate(max_general_drop=0.2), (), cost(0.2, task="t")).verdict == "ship"


def test_what_nobody_measured_is_said_and_decides_only_where_it_is_required() -> None:
    for nothing in (None, General(missing=["general text: no texts"])):
        found = judge(SHIPS, {}, None, (), nothing)
        assert found.verdict == "ship" and found.reason.endswith("general ability was not measured")
        assert judge(SHIPS, {}, Gate(general_required=True), (), nothing).verdict == "unmeasured"
    worse = {**SHIPS, Arm.MIGRATED: scored(0.2)}
    assert judge(worse, {}, Gate(general_required=True), (), None).verdict == "retrain", "no better for it"
    assert judge(worse, {}, None, (), cost(9.0)).verdict == "retrain"


def test_texts_that_something_read_are_left_out() -> None:
    settings = GeneralSettings(samples=2, characters=20)
    long = "a text of which only the beginning is read"
    given = ["", "  ", "one text", long, "one text", f"{long[:20]} by coincidence", "two   texts", "three", "four"]
    kept, left_out = held_out_texts(given, [long, "two texts"], settings)
    assert kept == ["one text", long[:20]] and left_out == 2
    kept, left_out = held_out_texts(given, [], settings.model_copy(update={"samples": 9}))
    assert kept == ["one text", long[:20], "two   texts", "three", "four"], (
        "what is the same once it is cut counts once"
    )
    assert left_out == 0
