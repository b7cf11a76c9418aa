"""Paired comparisons against plain counting, and against what the statistics are known to be."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any

import pytest

from lorasuite.errors import DataError
from lorasuite.evaluation import compare, compare_arms, mcnemar, metrics, read_samples, sample_id

#: 30 right in both, 12 only in the first, 3 only in the second, 5 in neither.
PATTERN = [(1, 1)] * 30 + [(1, 0)] * 12 + [(0, 1)] * 3 + [(0, 0)] * 5


def records(scores: Sequence[float], task: str | None = "t", **more: Any) -> list[dict[str, Any]]:
    """Task samples as they are written; ``task`` None: held-out rows."""
    key = {"task": task} if task else {}
    return [
        {**key, "index": n, "prompt": f"p{n}", "target": f"t{n}", "output": f"o{n}={score}", **more}
        | ({"scores": {"exact_match,answer": score, "answered,answer": 1.0}} if task else {"exact_match": bool(score)})
        for n, score in enumerate(scores)
    ]


@pytest.mark.parametrize("task", ["t", None])
def test_flips_and_test_are_those_counted_by_hand(task: str | None) -> None:
    first, second = records([a for a, _ in PATTERN], task), records([b for _, b in PATTERN], task)
    random.Random(0).shuffle(second)
    found = compare(first, second, names=("old", "new"))
    prefix = f"{task}/" if task else ""
    assert found.task == task
    assert found.metric == ("exact_match,answer" if task else "exact_match")
    assert (found.n, found.both_right, found.both_wrong) == (50, 30, 5)
    assert found.negative_flips == [f"{prefix}{n}" for n in range(30, 42)]
    assert found.positive_flips == [f"{prefix}{n}" for n in range(42, 45)]
    assert (found.first_score, found.second_score) == (42 / 50, 33 / 50)
    assert found.difference == pytest.approx(-9 / 50)
    # 15 flips of a fair coin, 3 or fewer on one side or the other
    assert found.mcnemar_p == pytest.approx(2 * sum(comb(15, k) for k in range(4)) / 2**15)
    assert [example["id"] for example in found.examples] == found.negative_flips[:5]
    assert found.examples[0] == {
        "id": f"{prefix}30",
        "prompt": "p30",
        "target": "t30",
        "first_output": "o30=1",
        "second_output": "o30=0",
    }


def test_interval_is_the_normal_one_for_many_samples_and_needs_the_pairing() -> None:
    many = PATTERN * 20
    found = compare(records([a for a, _ in many]), records([b for _, b in many]))
    differences = [b - a for a, b in many]
    mean = sum(differences) / len(many)
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / len(many) / len(many))
    assert found.interval == pytest.approx((mean - 1.96 * spread, mean + 1.96 * spread), abs=2e-3)
    # unpaired, the variances of the two would add up
    p, q = found.first_score, found.second_score
    unpaired = 2 * 1.96 * math.sqrt((p * (1 - p) + q * (1 - q)) / len(many))
    assert found.interval is not None
    assert found.interval[1] - found.interval[0] < 0.9 * unpaired
    assert compare(records([a for a, _ in many]), records([b for _, b in many])) == found  # seeded


def test_bits_per_byte_is_a_ratio_of_sums_and_has_no_flips() -> None:
    sizes = [1, 10, 100, 5]

    def rows(nats: Sequence[float]) -> list[dict[str, Any]]:
        return [
            {"index": n, "target": "", "exact_match": None, "loglikelihood": -x, "bytes": size}
            for n, (x, size) in enumerate(zip(nats, sizes, strict=True))
        ]

    found = compare(rows([1, 2, 3, 4]), rows([2, 4, 6, 8]))
    assert found.metric == "bits_per_byte"
    assert found.first_score == pytest.approx(10 / math.log(2) / 116)
    assert found.difference == pytest.approx(found.first_score)
    assert (found.mcnemar_p, found.both_right, found.negative_flips) == (None, None, [])
    assert found.interval is not None
    assert found.interval[0] <= found.difference <= found.interval[1]


def test_same_arm_twice_and_a_single_sample() -> None:
    ones = records([1, 0, 1])
    found = compare(ones, ones)
    assert (found.difference, found.interval, found.mcnemar_p) == (0, (0, 0), 1)
    assert compare(ones[:1], ones[:1]).interval is None
    assert mcnemar(0, 6) == pytest.approx(2 / 64) == mcnemar(6, 0)


def test_samples_that_do_not_pair_are_refused() -> None:
    rows = records([1, 0, 1])
    with pytest.raises(DataError, match=r"a: has no samples"):
        compare([], rows, names=("a", "b"))
    with pytest.raises(DataError, match=r"1 samples are in one of them only \(such as t/2\)"):
        compare(rows, rows[:2])
    with pytest.raises(DataError, match="1 samples twice"):
        compare([*rows, rows[0]], rows)
    with pytest.raises(DataError, match="sample t/0 has another target in each"):
        compare(rows, [{**row, "target": "x"} for row in rows])
    with pytest.raises(DataError, match=r"no metric 'acc' in common. Both have: exact_match,answer, answered,answer"):
        compare(rows, rows, metric="acc")


def test_arms_are_compared_by_task_in_the_pairs_asked_for(tmp_path: Path) -> None:
    arms = {name: {"t": records([1, 0]), "u": records([0, 0], "u")} for name in ("a", "b", "c")}
    arms["c"].pop("u")
    assert [(c.first, c.second, c.task) for c in compare_arms(arms)] == [
        ("a", "b", "t"), ("a", "b", "u"), ("a", "c", "t"), ("b", "c", "t"),
    ]  # fmt: skip
    assert [(c.first, c.task) for c in compare_arms(arms, [("c", "a"), ("c", "x")])] == [("c", "t")]
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in arms["a"]["t"]))
    assert read_samples(file) == arms["a"]["t"]
    assert [sample_id(row) for row in read_samples(file)] == ["t/0", "t/1"]
    with pytest.raises(DataError, match="is not a file of samples"):
        read_samples(tmp_path / "none")
    both = [{"index": 0, "scores": {"acc,none": 1.0, "acc_norm,none": 0.0, "acc_bytes,none": 1.0}}]
    assert metrics(both) == ["acc_norm,none", "acc,none", "acc_bytes,none"]
