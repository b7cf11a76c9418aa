"""What migrations and evaluations share: arms on held-out rows and on tasks, as cached stages, compared in pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from artifacts import Artifact
from flows.context import Context
from lorasuite.data import Row
from lorasuite.evaluation import (
    EvaluationSettings,
    TaskScore,
    compare,
    compare_arms,
    group_score,
    metrics,
    read_samples,
)
from lorasuite.evaluation.eval_tasks import GROUPS, expand
from tasks.adapter_stages import evaluation, task_evaluation
from tasks.fingerprints import fingerprint_data, fingerprint_task
from tasks.stage import Ref

#: Settings that tasks by name heed; the rest is the tasks' own.
TASK_SETTINGS = {"batch_size", "limit", "seed"}
ROWS = "rows"
SAMPLES = "samples.jsonl"
BITS = "bits_per_byte"


class Measured:
    """The results of arms: summaries, and where each arm's samples are."""

    def __init__(
        self,
        context: Context,
        settings: EvaluationSettings,
        rows: Sequence[Row] = (),
        tasks: Sequence[str] = (),
        eval_dir: Path | None = None,
        include_path: Path | None = None,
    ) -> None:
        self.context, self.settings = context, settings
        self.rows, self.tasks = rows, tuple(tasks)
        self.task_fingerprints = {task: fingerprint_task(task, eval_dir, include_path) for task in expand(tasks)}
        #: Arm to result on the held-out rows, and arm to task to score.
        self.evaluation: dict[str, Any] = {}
        self.scores: dict[str, dict[str, Any]] = {}
        self._artifacts: dict[str, dict[str, Artifact]] = {}

    def measure(self, arm: str, inputs: Mapping[str, str | Ref], **paths: Path) -> None:
        """Run every stage of one arm. ``inputs``: its ``model``, ``tokenizer`` and ``adapter`` (none: bare)."""
        made = self._artifacts.setdefault(arm, {})
        if self.rows:
            values = self.settings.model_dump(mode="json")
            ref = self.context.run(
                evaluation, {**inputs, "eval_data": fingerprint_data(self.rows)}, values, label=arm, **paths
            )
            made[ROWS] = self.context.open(ref)
            self.evaluation[arm] = made[ROWS].info
        found: dict[str, Any] = {}
        for task, fingerprint in self.task_fingerprints.items():
            values = {**self.settings.model_dump(mode="json", include=TASK_SETTINGS), "task": task}
            values["lm_eval"] = version("lm_eval")
            ref = self.context.run(
                task_evaluation, {**inputs, "task": fingerprint}, values, label=f"{arm}, {task}", **paths
            )
            made[task] = self.context.open(ref)
            found |= made[task].info
        for group in [name for name in self.tasks if name in GROUPS]:
            parts = {task: TaskScore.model_validate(found[task]) for task in GROUPS[group]}
            found[group] = group_score(group, parts).summary()
        if found:
            self.scores[arm] = found

    def comparisons(self, pairs: Iterable[tuple[str, str]] | None = None) -> list[dict[str, Any]]:
        """Arms compared sample by sample, on the held-out rows and on each task; all pairs by default.

        Held-out rows that are right or wrong are compared by their likelihood as well: it tells of differences where
        nothing is right yet.
        """
        arms: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for arm, artifacts in self._artifacts.items():
            arms[arm] = {}
            for artifact in artifacts.values():
                for record in read_samples(artifact.file(SAMPLES)):
                    arms[arm].setdefault(record.get("task", ROWS), []).append(record)
        found = compare_arms(arms, pairs)
        for first, second in [(one.first, one.second) for one in found if one.task is None and one.metric != BITS]:
            both = arms[first][ROWS], arms[second][ROWS]
            if all(BITS in metrics(rows) for rows in both):
                found.append(compare(*both, metric=BITS, names=(first, second)))
        return [comparison.model_dump(mode="json") for comparison in found]

    def samples(self) -> dict[str, Path]:
        """Files of per-sample results: by arm for held-out rows, ``arm/task`` for tasks."""
        return {
            arm if name == ROWS else f"{arm}/{name}": artifact.file(SAMPLES)
            for arm, artifacts in self._artifacts.items()
            for name, artifact in artifacts.items()
        }
