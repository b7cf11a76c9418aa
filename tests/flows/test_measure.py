"""Groups of tasks are run task by task and averaged; the gate counts each task once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.measure import Asked, Measured
from lorasuite.evaluation import Arm, EvaluationSettings, TaskScore, TaskSummary, judge
from lorasuite.evaluation.eval_tasks import GROUPS

DATA = Path(__file__).parents[1] / "data" / "eval_tasks"


class FakeContext:
    """Runs nothing: scores a task by its place in the group, and remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def base(self, side: str, own: Any = None) -> dict[str, Any]:
        return {"model": side, "tokenizer": side}

    def base_path(self, side: str) -> dict[str, Path]:
        return {"base": Path(side)}

    def run(self, stage: Any, inputs: Any, settings: dict[str, Any], label: str, paths: dict[str, Path]) -> str:
        self.asked.append((label, settings))
        return str(settings["task"])

    def open(self, task: str) -> Any:
        value = GROUPS["lorasuite_math"].index(task) / 10 if task in GROUPS["lorasuite_math"] else 1.0
        score = TaskScore(
            task=task,
            metrics={"exact_match,answer": value},
            stderr={"exact_match,answer": 0.1},
            n=4,
            num_fewshot=0,
            version="1.0",
            batch_size=2,
            limit=4,
            seed=1,
            generation={},
        )
        return SimpleNamespace(info={task: score.summary()})


def test_groups_are_averages_over_tasks_kept_by_themselves() -> None:
    context: Any = FakeContext()
    settings = EvaluationSettings(batch_size=2, limit=4, max_new_tokens=9)
    names = ["lorasuite_math", "lorasuite_gsm8k", "lorasuite_boolq"]
    measured = Measured(context, Asked.of(context, settings, (), names, DATA))
    measured.measure("new", "new")
    assert [label for label, _ in context.asked] == [
        f"new, {task}" for task in (*GROUPS["lorasuite_math"], "lorasuite_boolq")
    ]
    # what does not concern a task does not make it run again
    assert set(context.asked[0][1]) == {"batch_size", "limit", "seed", "task", "lm_eval"}
    scores = measured.scores["new"]
    assert scores["lorasuite_math"]["metrics"]["exact_match,answer"] == pytest.approx(0.3)
    assert scores["lorasuite_math"]["stderr"]["exact_match,answer"] == pytest.approx(0.1 / 7**0.5)
    assert (scores["lorasuite_math"]["n"], scores["lorasuite_math"]["group"]) == (28, True)

    typed = {task: TaskSummary.model_validate(score) for task, score in scores.items()}
    found = judge({}, dict.fromkeys((Arm.OLD_ADAPTER, Arm.NEW, Arm.MIGRATED), typed))
    assert found.migrated == pytest.approx((0.3 * 7 + 1.0) / 8)
