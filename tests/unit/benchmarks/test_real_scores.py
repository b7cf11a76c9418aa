"""What tasks on real bases are scored by."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.real.scores import difference, score, slot_f1


def sample(output: str | None, target: str) -> dict[str, Any]:
    return {"output": output, "target": target, "exact_match": output is not None and output.strip() == target.strip()}


def test_json_is_compared_as_it_parses() -> None:
    target = '{"intent": "Play", "slots": {"artist": "A", "year": "1"}}'
    same = sample(' {"slots": {"year": "1", "artist": "A"}, "intent": "Play"}', target)
    wrong, broken = sample('{"intent": "Play", "slots": {"artist": "B"}}', target), sample('{"intent": ', target)
    assert score("snips", [same, wrong, broken]) == pytest.approx(1 / 3)
    assert score("other", [same]) == 0, "exact match is of the text"
    # of three found two are right, and six are wanted
    assert slot_f1([same, wrong, broken]) == pytest.approx(2 * 2 / (3 + 6))
    assert slot_f1([sample("x", "y")]) is None


def test_sentences_by_chrf_and_labels_by_exact_match() -> None:
    assert score("e2e", [sample(" A pub by the river.", "A pub by the river.")]) == pytest.approx(1)
    assert 0 < (score("e2e", [sample("A pub.", "A pub by the river.")]) or 0) < 0.7
    assert score("banking77", [sample(" a", "a"), sample("b", "a")]) == 0.5
    assert score("banking77", [sample(None, "a")]) is None and score("banking77", []) is None


def test_differences_are_of_the_task_s_own_score() -> None:
    target = "A pub by the river, for families, with Italian food."
    texts = ["A pub by the river.", "Italian food by the river.", "A pub for families.", "A cheap pub."]
    measured = {"loglikelihood": -1.0, "tokens": 9, "bytes": 9}
    rows = [{**sample(text, target), **measured, "index": n} for n, text in enumerate(texts)]
    better = [{**row, "output": f" {target}" if n % 2 else row["output"]} for n, row in enumerate(rows)]
    apart, within = difference("e2e", rows, better[::-1])
    assert apart == pytest.approx((score("e2e", better) or 0) - (score("e2e", rows) or 0)), "whatever the order"
    assert within is not None and 0 <= within[0] < apart < within[1] < 1
    assert difference("e2e", rows, rows) == (0, (0, 0))

    parsed = [
        {**row, "target": '{"intent": "a", "slots": {}}', "output": '{"slots": {}, "intent": "a"}'} for row in rows
    ]
    broken = [{**row, "output": "{"} for row in parsed]
    assert difference("snips", broken, parsed) == (1, (1, 1)), "equal as parsed, not as text"
    assert difference("banking77", broken, parsed) == (0, (0, 0))
