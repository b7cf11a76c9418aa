"""Evaluation on lm-eval tasks by name: the paper's fifteen, lm-eval's own, or the user's. Loads lm-eval when called."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from lorasuite.data import end_tokens, prompt_ids
from lorasuite.errors import ConfigError, DataError, LoRASuiteError, NumericalError, Problem, did_you_mean
from lorasuite.evaluation._harness import (
    RequestCounter,
    adapted,
    base_model,
    context_length,
    evaluation_tokenizer,
    lm_class,
    quiet,
    run_lm_eval,
    versions,
)
from lorasuite.evaluation._results import EvaluationSettings, write_jsonl
from lorasuite.evaluation._task_code import task_file_problems, trusted_code_only
from lorasuite.progress import EvaluationProgress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class TaskSample(BaseModel):
    """One document's result; ``task`` and ``index`` identify it (:func:`sample_id`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    index: int = Field(description="the document's number from 0, in the task's order")
    prompt: str
    target: str = Field(description="the right answer, as the task has it")
    output: str | None = Field(description="what the model wrote; None for tasks of likelihoods")
    loglikelihoods: list[float] | None = Field(description="of the options, in nats, for tasks of likelihoods")
    answers: dict[str, str | None] = Field(description="the answer each filter found in the output")
    scores: dict[str, float] = Field(description="keys as in TaskScore.metrics")


class TaskSummary(BaseModel):
    """One task's (or group's) scores; keys are ``metric,filter`` as lm-eval writes them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    group: bool = Field(False, description="a mean over tasks that are scored beside it")
    metrics: dict[str, float]
    stderr: dict[str, float] = Field(description="standard errors; none where there are fewer than two documents")
    n: int | None = Field(description="documents evaluated")
    num_fewshot: int | None
    version: str | None
    batch_size: int = Field(description="fixed: padding changes results in the last digits")
    limit: int | None
    seed: int
    generation: dict[str, Any] | None = Field(description="settings of the generation; None for likelihoods and groups")
    truncated: int = Field(0, description="prompts that lost their start, the context being too short for them")
    seconds: float | None = Field(None, description="of all tasks of the call together; None for groups")
    versions: dict[str, str] = {}


class TaskScore(TaskSummary):
    """The scores and the samples they come from."""

    samples: list[TaskSample] = []

    def summary(self) -> dict[str, Any]:
        """Everything but the samples, as JSON-able values."""
        return self.model_dump(mode="json", exclude={"samples"})


def write_task_samples(scores: Mapping[str, TaskScore], path: Path) -> None:
    """Write the samples of one arm's tasks as JSONL, one line each."""
    write_jsonl((sample for score in scores.values() for sample in score.samples), path)


def evaluate_tasks(
    base: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    settings: EvaluationSettings,
    *,
    adapters: Mapping[str, Path | None],
    eval_dir: Path | None = None,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    device: str | torch.device = "cpu",
    progress: EvaluationProgress | None = None,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, TaskScore]]:
    """Evaluate adapters on lm-eval tasks (or groups, or tags) by name: ``{adapter: {task or group: score}}``.

    Prompts, tokenisation, stops and metrics are the tasks' and lm-eval's; only ``batch_size``, ``limit`` and ``seed``
    of the settings apply. Answers have at most half of the model's context, prompts the rest.

    Args:
        base: a model, which is moved to ``device`` and otherwise given back as it came, or where to load it from.
        tokenizer: the base's; it is not changed.
        tasks: names.
        settings: of the evaluation.
        adapters: PEFT directories by name; None is the bare base.
        eval_dir: of the rows of the paper's fifteen tasks, laid out as LLM-Adapters' ``dataset/``; without it they come
            from the Hub, as those of lm-eval's own tasks do.
        include_path: a directory of more task YAMLs.
        num_fewshot: examples before each document, where the task does not say that there must be none.
        apply_chat_template: whether prompts are put into the tokenizer's chat template.
        device: ``cpu`` or ``cuda``.
        progress: told of every answered request.
        trust_remote_code: whether code of the base's own, and of task files, may run.

    Raises:
        ConfigError: no adapters, no or unknown tasks, or a device that is not there.
        DataError: a task's data cannot be loaded.
        AdapterError: an adapter does not fit the base.
        CheckpointError: the base cannot be loaded.
        NumericalError: the model's likelihoods are NaN.
    """
    if not tasks:
        raise ConfigError([Problem("tasks", "there are none", "Name at least one lm-eval task")])
    tokenizer = evaluation_tokenizer(tokenizer, generate=True)
    results: dict[str, dict[str, TaskScore]] = {}
    # Some of lm-eval's metrics and task scripts print.
    with contextlib.redirect_stdout(sys.stderr), quiet(), trusted_code_only(trust_remote_code):
        loaded = _load_tasks(tasks, eval_dir, include_path, num_fewshot)
        with base_model(base, adapters, device, trust_remote_code) as model:
            context = context_length(model, tokenizer)
            generation = {name: _fit(task, model, tokenizer, context) for name, task in loaded["tasks"].items()}
            requests = sum(_requests(task, settings.limit) for task in loaded["tasks"].values())
            for label, adapter in adapters.items():
                started = time.perf_counter()
                counter = RequestCounter(label, progress, requests)
                with adapted(model, adapter, device) as tuned:
                    lm = lm_class()(tuned, tokenizer, settings.batch_size, special=None)
                    for task in loaded["tasks"].values():
                        task.set_fewshot_seed(seed=settings.seed)
                    outcome = run_lm_eval(
                        lm,
                        loaded,
                        seed=settings.seed,
                        limit=settings.limit,
                        bootstrap_iters=1000,
                        apply_chat_template=apply_chat_template,
                        progress=counter,
                    )
                counter.finish()
                seconds = time.perf_counter() - started
                results[label] = {
                    name: _score(name, outcome, settings, generation.get(name), tokenizer, context, seconds)
                    for name in outcome["results"]
                }
    return results


def check_tasks(
    tasks: Sequence[str],
    eval_dir: Path | None = None,
    include_path: Path | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Find unknown tasks and missing local rows before any model is loaded.

    Raises:
        ConfigError: naming every task that does not exist, and every task file that would run code without leave.
        DataError: naming every file of rows that does not.
    """
    from lorasuite.evaluation.eval_tasks import GROUPS, TASKS, data_file, expand
    from lorasuite.evaluation.eval_tasks.sources import check_file

    if eval_dir is not None:
        problems = []
        for task in [task for task in expand(tasks) if task in TASKS]:
            try:
                check_file(data_file(task, eval_dir))
            except DataError as error:
                problems += error.problems
        if problems:
            raise DataError(problems)
    others = [task for task in tasks if task not in TASKS and task not in GROUPS]
    if others and (problems := task_file_problems(others, include_path, trust_remote_code)):
        raise ConfigError(problems)
    if others:
        with contextlib.redirect_stdout(sys.stderr), quiet():
            _manager(others, None, include_path)


def group_score(group: str, scores: Mapping[str, TaskScore]) -> TaskScore:
    """The unweighted mean over a group's tasks, as the paper's averages are, of the metrics that all have.

    Its standard error is that of a mean of independent means, ``√Σse²/k``.

    Args:
        group: its name.
        scores: of its tasks, at least one.
    """
    parts = list(scores.values())
    common = [key for key in parts[0].metrics if all(key in part.metrics for part in parts)]
    return TaskScore(
        task=group,
        group=True,
        metrics={key: sum(part.metrics[key] for part in parts) / len(parts) for key in common},
        stderr={
            key: math.sqrt(sum(part.stderr[key] ** 2 for part in parts)) / len(parts)
            for key in common
            if all(key in part.stderr for part in parts)
        },
        n=sum(part.n or 0 for part in parts),
        num_fewshot=parts[0].num_fewshot,
        version=parts[0].version,
        batch_size=parts[0].batch_size,
        limit=parts[0].limit,
        seed=parts[0].seed,
        generation=None,
        truncated=sum(part.truncated for part in parts),
        versions=parts[0].versions,
    )


def _manager(tasks: Sequence[str], eval_dir: Path | None, include_path: Path | None) -> Any:
    """An lm-eval task manager that knows every one of the tasks; ConfigError names those that none knows."""
    # Indexing lm-eval's own thousands of task files takes seconds: only where a name needs it.
    for defaults in (False, True):
        manager = _index(defaults, eval_dir, include_path)
        known = manager.all_tasks
        unknown = [task for task in tasks if task not in known and not Path(task).is_file()]
        if not unknown:
            return manager
    raise ConfigError(
        [
            # The list of choices has thousands of names; its start is enough to show what they look like.
            Problem(f"task {task!r}", "is not known to lm-eval", did_you_mean(task, sorted(known))[:200])
            for task in unknown
        ]
    )


@lru_cache(maxsize=4)
def _index(defaults: bool, eval_dir: Path | None, include_path: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    from lorasuite.evaluation.eval_tasks import TASK_FILES

    # a later directory has precedence: the name of one of the paper's tasks always means that task
    folders = [*([str(include_path)] if include_path is not None else []), str(TASK_FILES)]
    metadata = {} if eval_dir is None else {"eval_dir": str(eval_dir)}
    return TaskManager(include_path=folders, include_defaults=defaults, metadata=metadata)


def _load_tasks(tasks: Sequence[str], eval_dir: Path | None, include_path: Path | None, num_fewshot: int | None) -> Any:
    """lm-eval's tasks by name, with the number of few-shot examples set as ``simple_evaluate`` does."""
    manager = _manager(tasks, eval_dir, include_path)
    try:
        loaded = manager.load(list(tasks))
    except LoRASuiteError:
        raise
    except Exception as error:  # data set scripts, the Hub and the network raise what they like
        remedy = "Check the network, or HF_DATASETS_CACHE for an offline copy; the paper's tasks also read --eval-dir"
        raise DataError([Problem(", ".join(tasks), f"cannot be loaded ({error})", remedy)]) from error
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:  # 0 in a task's own config means it must be 0
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def _fit(task: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: int) -> dict[str, Any] | None:
    """Make a task's generation fit the model, where it generates; the settings used.

    lm-eval stops at an answer that leaves no room for a prompt, half-way through. End tokens are given explicitly: its
    own check reads text from which special tokens have been removed.
    """
    if task.OUTPUT_TYPE != "generate_until":
        return None
    settings = copy.deepcopy(dict(task.get_config("generation_kwargs") or {}))
    length = settings.get("max_gen_toks", 256)
    settings["max_gen_toks"] = min(length, max(1, context // 2))
    settings.setdefault("eos_token_id", sorted(end_tokens(model, tokenizer)))
    task.set_config(key="generation_kwargs", value=settings)
    return copy.deepcopy(settings)


def _requests(task: Any, limit: int | None) -> int:
    """About how many requests the model will answer: every document is taken to have as many options as the first."""
    documents = min(len(task.eval_docs), limit or sys.maxsize)
    many = task.OUTPUT_TYPE == "multiple_choice" and documents
    return documents * (len(task.doc_to_choice(task.eval_docs[0])) if many else 1)


def _score(
    task: str,
    outcome: Mapping[str, Any],
    settings: EvaluationSettings,
    generation: dict[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    seconds: float,
) -> TaskScore:
    """One task's (or group's) numbers out of lm-eval's result."""
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    values = outcome["results"][task]
    for key, value in values.items():
        if "," not in key or not isinstance(value, (int, float)):
            continue
        metric, _, chosen = key.partition(",")
        if metric.endswith("_stderr"):
            stderr[f"{metric.removesuffix('_stderr')},{chosen}"] = float(value)
        else:
            metrics[key] = float(value)
    version = outcome.get("versions", {}).get(task)
    entries = outcome.get("samples", {}).get(task)
    samples = _samples(task, entries or [])
    truncated = 0
    if generation is not None:
        room = context - generation["max_gen_toks"]
        truncated = sum(len(prompt_ids(tokenizer, s.prompt, special=True)) > room for s in samples)
        if truncated:
            what = "%s: %d of %d prompts are longer than the %d tokens there is room for; they lose their start"
            logger.warning(what, task, truncated, len(samples), room)
    return TaskScore(
        task=task,
        group=entries is None,
        metrics=metrics,
        stderr=stderr,
        n=values.get("sample_len", len(samples) or None),
        num_fewshot=outcome.get("n-shot", {}).get(task),
        version=None if version is None else str(version),
        batch_size=settings.batch_size,
        limit=settings.limit,
        seed=settings.seed,
        generation=generation,
        truncated=truncated,
        seconds=None if entries is None else seconds,
        versions=versions(),
        samples=samples,
    )


def _samples(task: str, entries: Sequence[Mapping[str, Any]]) -> list[TaskSample]:
    """lm-eval's logged samples, one for each document and filter, as one for each document."""
    found: dict[int, dict[str, Any]] = {}
    for entry in entries:
        index, chosen = int(entry["doc_id"]), entry["filter"]
        first = entry["resps"][0][0]
        written = isinstance(first, str)
        sample = found.setdefault(
            index,
            {
                "task": task,
                "index": index,
                "prompt": str(entry["arguments"][0][0]),
                "target": str(entry["target"]),
                "output": first if written else None,
                "loglikelihoods": None if written else [_loglikelihood(response[0]) for response in entry["resps"]],
                "answers": {},
                "scores": {},
            },
        )
        if written:
            sample["answers"][chosen] = _answer(entry["filtered_resps"][0])
        for metric in entry["metrics"]:
            value = entry[metric]
            if isinstance(value, (bool, int, float)):  # some metrics keep lists for their aggregation
                sample["scores"][f"{metric},{chosen}"] = float(value)
    bad = [index for index, sample in found.items() if any(map(math.isnan, sample["loglikelihoods"] or []))]
    if bad:
        what = f"its log-likelihood is not a number ({len(bad)} of {len(found)} documents)"
        remedy = "Check the adapter and the base for NaN weights, or use a wider precision"
        raise NumericalError([Problem(f"{task}, document {bad[0] + 1}", what, remedy)])
    return [TaskSample(**found[index]) for index in sorted(found)]


def _loglikelihood(response: Any) -> float:
    """Of one request: ``(log-likelihood, is greedy)``, or for rolling ones the number alone."""
    return float(response[0] if isinstance(response, (tuple, list)) else response)


def _answer(filtered: Any) -> str | None:
    while isinstance(filtered, (list, tuple)) and filtered:
        filtered = filtered[0]
    return None if filtered is None else str(filtered)
