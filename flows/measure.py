"""Arms measured on held-out rows and on tasks, as cached stages, and compared: by migrations and experiments alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from artifacts import Artifact
from flows.context import Context
from lorasuite.adapters import OwnTokenizer
from lorasuite.data import Row
from lorasuite.evaluation import (
    TASK_METRICS,
    EvaluationSettings,
    TaskScore,
    compare,
    compare_arms,
    group_score,
    metrics,
    read_samples,
)
from lorasuite.evaluation.eval_tasks import GROUPS, expand
from lorasuite.reporting import Score
from tasks.bases import OWN_TOKENIZER
from tasks.evaluation_stages import SAMPLES, evaluation, general_text, task_evaluation
from tasks.fingerprints import fingerprint_task
from tasks.folders import weights_digest
from tasks.stage import Ref

#: Settings that tasks by name heed; the rest is the tasks' own.
TASK_SETTINGS = {"batch_size", "limit", "seed"}
ROWS = "rows"
TEXTS = "general text"
BITS = "bits_per_byte"


@dataclass(frozen=True)
class Asked:
    """What arms are measured on: held-out rows, and lm-eval tasks by name with the fingerprint of what each asks."""

    settings: EvaluationSettings
    rows: Ref | None = None
    tasks: Mapping[str, str] = field(default_factory=dict)
    #: Groups among the names that were asked for: their scores are means over their tasks.
    groups: tuple[str, ...] = ()
    #: Where tasks find their files: ``eval_dir``, ``include_path``.
    folders: Mapping[str, Path] = field(default_factory=dict)
    #: Texts that bits per byte are measured of, and nothing else.
    texts: Ref | None = None

    @classmethod
    def of(
        cls,
        context: Context,
        settings: EvaluationSettings,
        rows: Sequence[Row] = (),
        tasks: Sequence[str] = (),
        eval_dir: Path | None = None,
        include_path: Path | None = None,
    ) -> Asked:
        """Of rows that were read, and of tasks and groups of tasks by name.

        Raises:
            DataError: if a task lacks its rows.
        """
        folders = {n: p for n, p in (("eval_dir", eval_dir), ("include_path", include_path)) if p is not None}
        asked = {task: fingerprint_task(task, eval_dir, include_path) for task in expand(tasks)}
        groups = tuple(name for name in tasks if name in GROUPS)
        return cls(settings, context.keep_rows(rows) if rows else None, asked, groups, folders)


def evaluated(
    context: Context,
    side: str,
    adapter: Ref | str | None,
    asked: Asked,
    label: str,
    paths: Mapping[str, Path] | None = None,
    own_tokenizer: OwnTokenizer | None = None,
) -> dict[str, Ref]:
    """One arm's results: by ``rows`` for the held-out rows, ``general text`` for texts, and by task.

    Args:
        side: the base, ``old`` or ``new``.
        adapter: an artifact, or the fingerprint of the adapter that lies at the path ``adapter``; None: bare.
        own_tokenizer: an adapter's, in place of the base's.
    """
    inputs: dict[str, Any] = context.base(side, own_tokenizer)
    if adapter is not None:
        inputs["adapter"] = adapter
    paths = {**context.base_path(side), **asked.folders, **(paths or {})}
    if own_tokenizer is not None:
        paths[OWN_TOKENIZER] = own_tokenizer.folder
    found: dict[str, Ref] = {}
    if asked.rows is not None:
        values = asked.settings.model_dump(mode="json")
        found[ROWS] = context.run(evaluation, {**inputs, "rows": asked.rows}, values, label, paths)
    if asked.texts is not None:
        values = asked.settings.model_dump(mode="json", include={"batch_size"})
        found[TEXTS] = context.run(general_text, {**inputs, "texts": asked.texts}, values, label, paths)
    common = {**asked.settings.model_dump(mode="json", include=TASK_SETTINGS), "lm_eval": version("lm_eval")}
    for task, fingerprint in asked.tasks.items():
        values = {**common, "task": task}
        found[task] = context.run(task_evaluation, {**inputs, "task": fingerprint}, values, f"{label}, {task}", paths)
    return found


class Measured:
    """The results of arms: summaries, and where each arm's samples are."""

    def __init__(self, context: Context, asked: Asked) -> None:
        self.context, self.asked = context, asked
        #: Arm to result on the held-out rows, to that on texts, and arm to task to score.
        self.evaluation: dict[str, Any] = {}
        self.text: dict[str, Any] = {}
        self.scores: dict[str, dict[str, Any]] = {}
        #: Arm to the sha256 of the weight file of the stored adapter that was measured.
        self.weights: dict[str, str] = {}
        self._artifacts: dict[str, dict[str, Artifact]] = {}

    def measure(
        self,
        arm: str,
        side: str,
        adapter: Ref | str | None = None,
        paths: Mapping[str, Path] | None = None,
        own_tokenizer: OwnTokenizer | None = None,
    ) -> None:
        """Run every stage of one arm; the arguments are those of :func:`evaluated`."""
        if isinstance(adapter, Ref):
            self.weights[arm] = weights_digest(self.context.open(adapter))
        refs = evaluated(self.context, side, adapter, self.asked, arm, paths, own_tokenizer)
        made = self._artifacts[arm] = {name: self.context.open(ref) for name, ref in refs.items()}
        if ROWS in made:
            self.evaluation[arm] = made[ROWS].info
        if TEXTS in made:
            self.text[arm] = made[TEXTS].info
        found: dict[str, Any] = {}
        for name, artifact in made.items():
            if name not in (ROWS, TEXTS):
                found |= artifact.info
        for group in self.asked.groups:
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


def scores_of(rows_task: str, infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of :class:`lorasuite.reporting.Measurement` that an arm's evaluations give.

    Args:
        rows_task: what the held-out rows are called.
        infos: of the evaluation on the held-out rows, or of each task by name.
    """
    info = infos[0]
    if "bits_per_byte" not in info:  # lm-eval tasks by name
        scores: dict[str, Score] = {}
        metrics = set()
        for task, found in (item for part in infos for item in part.items()):
            values = {name.split(",")[0]: name for name in reversed(found["metrics"])}
            metric = next((name for name in TASK_METRICS if name in values), next(iter(values), None))
            if metric is not None:
                metrics.add(metric)
                error = found["stderr"].get(values[metric])
                scores[task] = Score(value=found["metrics"][values[metric]], stderr=error, n=found["n"])
        return {"metric": ", ".join(sorted(metrics)), "scores": scores}
    metric = "bits_per_byte" if info["exact_match"] is None else "exact_match"
    score = Score(value=info[metric], stderr=info[f"{metric}_stderr"], n=info["n"])
    return {"metric": metric, "scores": {rows_task: score}, "loss": info["loss"]}
