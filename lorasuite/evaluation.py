"""Held-out evaluation through lm-eval (EleutherAI's lm-evaluation-harness).

Data rows become lm-eval tasks in memory — greedy ``generate_until`` scored by exact match, ``loglikelihood`` of the
completion for the held-out loss, ``loglikelihood_rolling`` for text rows — so that no data set is looked up anywhere
and a result means what it means in every other lm-eval report. Prompts are tokenised by :mod:`lorasuite.data`, as in
training. Several adapters and the bare base share one load of the base model.

Importing this module loads neither torch, transformers nor lm-eval.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorasuite.data import (
    CONTEXT_TEMPLATE,
    INSTRUCTION_TEMPLATE,
    Row,
    encode_pair,
    fingerprint_rows,
    prompt_ids,
)
from lorasuite.errors import ConfigError, DataError, NumericalError, Problem, did_you_mean

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: ``progress(adapter, done, total)``: requests of this adapter answered so far.
Progress = Callable[[str, int, int], None]

#: Rows evaluated together: prompts the tokenizer completes with special tokens, conversations whose template spells
#: them out, and plain text.
_Group = Literal["plain", "chat", "text"]


class EvaluationSettings(BaseModel):
    """How to evaluate. Fixed batch size: padding changes results in the last digits, so it is recorded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(16, ge=1, description="rows evaluated together; fixed and recorded")
    max_new_tokens: int = Field(64, ge=1, description="at most half of the model's context is used for the answer")
    limit: int | None = Field(None, ge=1, description="evaluate the first rows only")
    generate: bool = Field(True, description="False: only likelihoods, several times cheaper")
    seed: int = Field(1234, ge=0, lt=2**32, description="of lm-eval's own draws")


class EvaluationSample(BaseModel):
    """One row's result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: int = Field(description="row number from 0")
    prompt: str
    target: str
    output: str | None = Field(description="what the model wrote; None where it was not asked to")
    exact_match: bool | None = Field(description="output equals target, both stripped of outer whitespace")
    loglikelihood: float = Field(description="of the completion given the prompt, in nats")
    tokens: int = Field(description="tokens the log-likelihood sums over; no EOS or end of turn among them")
    bytes: int = Field(description="UTF-8 bytes of the same text")


class EvaluationResult(BaseModel):
    """One adapter's (or the bare base's) results. Standard errors are None for fewer than two samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    exact_match: float | None = Field(description="share of rows; None where nothing was generated")
    exact_match_stderr: float | None
    loss: float = Field(description="nats per token of the completions (of the texts, for text rows)")
    loss_stderr: float | None
    perplexity: float = Field(description="exp(loss)")
    bits_per_byte: float = Field(description="comparable between tokenizers, as the loss is not")
    bits_per_byte_stderr: float | None
    n: int
    batch_size: int
    seconds: float
    task: dict[str, Any] = Field(description="what was asked: rows, template, stops, limits, seed, versions")
    samples: list[EvaluationSample]

    def summary(self) -> dict[str, Any]:
        """Everything but the samples, as JSON-able values."""
        return self.model_dump(exclude={"samples"})

    def write_samples(self, path: Path) -> None:
        """Write the samples as JSONL, one line each."""
        lines = (json.dumps(sample.model_dump(), ensure_ascii=False) for sample in self.samples)
        Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


class TaskScore(BaseModel):
    """One lm-eval task's scores; keys are ``metric,filter`` as lm-eval writes them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    metrics: dict[str, float]
    stderr: dict[str, float]
    n: int | None
    num_fewshot: int | None
    version: str | None


@dataclass(frozen=True)
class _Document:
    """One row as lm-eval sees it."""

    index: int
    group: _Group
    prompt: str
    completion: str
    suffix: str
    target: str
    prompt_tokens: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return {"index": self.index, "prompt": self.prompt, "completion": self.completion, "target": self.target}


# ------------------------------------------------------------------------------------------------------ evaluating


def evaluate(
    base: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: EvaluationSettings,
    *,
    adapters: Mapping[str, Path | None],
    device: str | torch.device = "cpu",
    name: str = "heldout",
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> dict[str, EvaluationResult]:
    """Evaluate adapters (a PEFT directory each; None: the bare base) on rows, in the mapping's order.

    Decoding is greedy, without few-shot examples, and stops at an end token (the tokenizer's, the model's, and for
    conversations the chat template's end of turn); at a newline too where no completion has one. The loss is over the
    completion without its EOS. For text rows it is over the whole text given a BOS (or EOS, where there is no BOS),
    in windows of the model's context. Embeddings are never resized. The tokenizer is not changed, and a model passed
    as ``base`` is moved to ``device`` and otherwise given back as it came.

    Raises:
        DataError: no rows, rows that cannot be rendered or do not fit the model's context, or no EOS token.
        ConfigError: no adapters to evaluate, or a device that is not there.
        AdapterError: an adapter does not fit the base.
        CheckpointError: the base cannot be loaded.
        NumericalError: the model's likelihoods are NaN or infinite.
    """
    used = list(rows[: settings.limit])
    if not used:
        raise DataError([Problem("evaluation rows", "there are none", "Give at least one row")])
    tokenizer = _evaluation_tokenizer(tokenizer, generate=settings.generate and any(r.kind != "text" for r in used))
    documents = _documents(used, tokenizer)
    results: dict[str, EvaluationResult] = {}
    with _model(base, adapters, device, trust_remote_code) as model:
        _check_lengths(documents, _context_length(model, tokenizer))
        plan = _generation_plan(documents, model, tokenizer, settings)
        for label, adapter in adapters.items():
            with _adapted(model, adapter, device) as adapted, _quiet():
                started = time.perf_counter()
                samples = _run(adapted, tokenizer, documents, plan, settings, name, label, progress)
                seconds = time.perf_counter() - started
            task = {
                "name": name,
                "rows_sha256": fingerprint_rows(used),
                "kinds": {kind: sum(row.kind == kind for row in used) for kind in sorted({row.kind for row in used})},
                "template_sha256": _template_hash(tokenizer, used),
                "num_fewshot": 0,
                "generation": plan,
                "limit": settings.limit,
                "seed": settings.seed,
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
                "device": next(model.parameters()).device.type,
                "versions": _versions(),
            }
            results[label] = _summarise(samples, settings.batch_size, seconds, task)
    return results


def evaluate_tasks(
    base: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    settings: EvaluationSettings,
    *,
    adapters: Mapping[str, Path | None],
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, TaskScore]]:
    """Evaluate adapters on lm-eval's own tasks (or groups, or tags) by name: ``{adapter: {task: score}}``.

    Prompts, tokenisation, stops and metrics are the tasks' and lm-eval's; only ``batch_size``, ``limit`` and ``seed``
    of the settings apply. Their data usually comes from the Hub. ``include_path`` adds a directory of task YAMLs.

    Raises:
        ConfigError: no adapters, no or unknown tasks, or a device that is not there.
        DataError: a task's data cannot be loaded.
        AdapterError, CheckpointError: as :func:`evaluate`.
    """
    if not tasks:
        raise ConfigError([Problem("tasks", "there are none", "Name at least one lm-eval task")])
    tokenizer = _evaluation_tokenizer(tokenizer, generate=True)
    results: dict[str, dict[str, TaskScore]] = {}
    # Some of lm-eval's metrics and task scripts print.
    with contextlib.redirect_stdout(sys.stderr), _quiet():
        loaded = _load_tasks(tasks, include_path, num_fewshot)
        with _model(base, adapters, device, trust_remote_code) as model:
            for label, adapter in adapters.items():
                with _adapted(model, adapter, device) as adapted:
                    lm = _lm_class()(adapted, tokenizer, settings.batch_size, special=None)
                    for task in loaded["tasks"].values():
                        task.set_fewshot_seed(seed=settings.seed)
                    outcome = _evaluate(
                        lm,
                        loaded,
                        settings,
                        limit=settings.limit,
                        bootstrap_iters=1000,
                        apply_chat_template=apply_chat_template,
                        progress=_Counter(label, progress, None),
                    )
                results[label] = {task: _score(task, outcome) for task in outcome["results"]}
    return results


# ------------------------------------------------------------------------------------------------------- preparing


def _evaluation_tokenizer(tokenizer: PreTrainedTokenizerBase, *, generate: bool) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer with an EOS and a pad token that is one of its own, padding on the left.

    lm-eval sets the padding of the tokenizer it is given, and where there is neither pad, unknown nor EOS token adds
    a new one, beyond the model's embeddings.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.eos_token_id is None and (generate or tokenizer.bos_token_id is None):
        raise DataError(
            [Problem("tokenizer", "has no EOS token", "Set tokenizer.eos_token to the one the base ends texts with")]
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    tokenizer.padding_side = "left"
    return tokenizer


def _documents(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[_Document]:
    """Rows as documents; DataError lists every row that cannot be rendered or has nothing to score."""
    documents: list[_Document] = []
    problems: list[Problem] = []
    for index, row in enumerate(rows):
        where = f"evaluation row {index + 1}"
        try:
            prompt, completion, suffix = row.target(tokenizer)
        except DataError as error:
            problems += [Problem(where, problem.what, problem.remedy) for problem in error.problems]
            continue
        if row.kind == "text":
            group: _Group = "text"
            prompt_tokens, tokens = 0, len(prompt_ids(tokenizer, completion, special=False))
        else:
            group = "chat" if row.kind == "messages" else "plain"
            pair = encode_pair(tokenizer, prompt, completion, special=group == "plain")
            prompt_tokens, tokens = len(pair[0]), len(pair[1])
        if not tokens or (group != "text" and not prompt):
            what = "has no prompt" if tokens else "has nothing to score"
            problems.append(Problem(where, what, "Fill it in, or drop the row"))
            continue
        documents.append(
            _Document(
                index=index,
                group=group,
                prompt=prompt,
                completion=completion,
                suffix=suffix,
                target=completion.strip(),
                prompt_tokens=prompt_tokens,
                tokens=tokens,
            )
        )
    if problems:
        raise DataError(problems)
    return documents


def _context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens the model can read at once, by lm-eval's rules."""
    from lm_eval.models.huggingface import HFLM

    probe = HFLM.__new__(HFLM)  # its rule is a property of model and tokenizer only
    probe._model, probe.tokenizer, probe._max_length = model, tokenizer, None
    return int(probe.max_length)


def _check_lengths(documents: Sequence[_Document], context: int) -> None:
    """DataError for completions longer than the context, which lm-eval would only assert on, half-way through.

    Prompts that must lose their start to fit are warned of.
    """
    problems = [
        Problem(
            f"evaluation row {document.index + 1}",
            f"its completion of {document.tokens} tokens does not fit the model's context of {context}",
            "Shorten it, or give it as a text row",
        )
        for document in documents
        if document.group != "text" and document.tokens > context
    ]
    if problems:
        raise DataError(problems)
    # One more than the context fits: the last token is predicted, never read.
    cut = [document for document in documents if document.prompt_tokens + document.tokens > context + 1]
    if cut:
        logger.warning(
            "%d of %d evaluation rows are longer than the model's context of %d tokens; their prompts lose their start",
            len(cut),
            len(documents),
            context,
        )


def _generation_plan(
    documents: Sequence[_Document],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSettings,
) -> dict[str, dict[str, Any]]:
    """lm-eval's generation settings for each group that is generated; recorded with the result."""
    plan: dict[str, dict[str, Any]] = {}
    if not settings.generate:
        return plan
    context = _context_length(model, tokenizer)
    for group in ("plain", "chat"):
        members = [document for document in documents if document.group == group]
        if not members:
            continue
        completions = [document.completion for document in members]
        if not any("\n" in completion for completion in completions):
            # Base models go on to the next question: without this, none of their answers would ever match.
            until = ["\n"]
        elif group == "plain" and not any("\nQuestion:" in completion for completion in completions):
            until = ["\nQuestion:"]
        else:
            until = []
        plan[group] = {
            "until": until,
            "max_gen_toks": min(settings.max_new_tokens, max(1, context // 2)),
            "do_sample": False,
            "temperature": 0.0,
            # Given explicitly: lm-eval's own EOS check reads text from which special tokens have been removed.
            "eos_token_id": _end_tokens(members, model, tokenizer),
        }
    return plan


def _end_tokens(
    documents: Sequence[_Document], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Ids that end an answer: the tokenizer's EOS, the model's, and a special token the chat template ends turns
    with.
    """
    ends = {int(tokenizer.eos_token_id)}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is not None:
        ends.update(int(token) for token in (configured if isinstance(configured, list) else [configured]))
    for document in documents:
        suffix = tokenizer(document.suffix, add_special_tokens=False)["input_ids"] if document.suffix.strip() else []
        if suffix and suffix[0] in tokenizer.all_special_ids:
            ends.add(int(suffix[0]))
    return sorted(ends)


@contextlib.contextmanager
def _model(
    base: str | PreTrainedModel,
    adapters: Mapping[str, Path | None],
    device: str | torch.device,
    trust_remote_code: bool,
) -> Iterator[PreTrainedModel]:
    """The base model on the device; a caller's model is given back as it came."""
    import torch

    from lorasuite.checkpoint import load_model
    from lorasuite.finetune import restored

    if not adapters:
        raise ConfigError([Problem("adapters", "there are none", "Name at least one, or None for the bare base")])
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError([Problem(f"device {device}", "is not available", "Use device cpu")])
    if isinstance(base, str):
        yield load_model(base, str(device), trust_remote_code=trust_remote_code)
        return
    with restored(base):
        yield base.to(device).eval()


@contextlib.contextmanager
def _adapted(
    model: PreTrainedModel, adapter: Path | None, device: str | torch.device
) -> Iterator[PreTrainedModel | PeftModel]:
    """The model with an adapter while the context lasts, or the bare model."""
    from lorasuite.finetune import attach_adapter, detach_adapter

    if adapter is None:
        yield model
        return
    wrapped = attach_adapter(model, Path(adapter), device=device)
    try:
        wrapped.eval()
        yield wrapped
    finally:
        detach_adapter(wrapped)


# --------------------------------------------------------------------------------------------------------- running


def _run(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[_Document],
    plan: Mapping[str, dict[str, Any]],
    settings: EvaluationSettings,
    name: str,
    label: str,
    progress: Progress | None,
) -> list[EvaluationSample]:
    """Every document's sample, in order."""
    total = len(documents) + sum(document.group in plan for document in documents)
    counter = _Counter(label, progress, total)
    likelihoods: dict[int, float] = {}
    outputs: dict[int, str] = {}
    for group in ("plain", "chat", "text"):
        members = [document for document in documents if document.group == group]
        if not members:
            continue
        lm = _lm_class()(model, tokenizer, settings.batch_size, special=group == "plain")
        tasks = {f"{name}_{group}_loss": _likelihood_task(f"{name}_{group}_loss", members, rolling=group == "text")}
        if group in plan:
            tasks[f"{name}_{group}"] = _generation_task(f"{name}_{group}", members, plan[group])
        for task in tasks.values():
            task.set_fewshot_seed(seed=settings.seed)
        outcome = _evaluate(lm, {"tasks": tasks}, settings, limit=None, bootstrap_iters=0, progress=counter)
        for task_name, entries in outcome["samples"].items():
            for entry in entries:
                index, response = int(entry["doc"]["index"]), entry["resps"][0][0]
                if task_name == f"{name}_{group}":
                    outputs[index] = str(response)
                else:
                    likelihoods[index] = float(response if group == "text" else response[0])
    counter.finish()
    samples = []
    for document in documents:
        output = outputs.get(document.index)
        samples.append(
            EvaluationSample(
                index=document.index,
                prompt=document.prompt,
                target=document.target,
                output=output,
                exact_match=None if output is None else output.strip() == document.target,
                loglikelihood=likelihoods[document.index],
                tokens=document.tokens,
                bytes=len(document.completion.encode("utf-8")),
            )
        )
    return samples


def _likelihood_task(name: str, documents: Sequence[_Document], *, rolling: bool) -> Any:
    """An lm-eval task of the completions' log-likelihoods."""

    def score(document: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
        return {"loglikelihood": float(results[0] if rolling else results[0][0])}

    return _task(
        name,
        documents,
        output_type="loglikelihood_rolling" if rolling else "loglikelihood",
        process_results=score,
        metric_list=[{"metric": "loglikelihood", "aggregation": "mean", "higher_is_better": True}],
    )


def _generation_task(name: str, documents: Sequence[_Document], generation: Mapping[str, Any]) -> Any:
    """An lm-eval task that generates and counts exact matches."""

    def score(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        return {"exact_match": float(results[0].strip() == document["target"])}

    return _task(
        name,
        documents,
        output_type="generate_until",
        generation_kwargs=copy.deepcopy(dict(generation)),
        process_results=score,
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )


def _task(name: str, documents: Sequence[_Document], **config: Any) -> Any:
    """A ``ConfigurableTask`` over documents in memory; prompts and completions are used verbatim, without templates."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    data = {"test": Dataset.from_list([document.to_dict() for document in documents])}
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: data,
            "test_split": "test",
            "doc_to_text": "prompt",
            "doc_to_target": "completion",
            "target_delimiter": "",  # the completion carries its own space
            "num_fewshot": 0,
            **config,
        }
    )


def _evaluate(
    lm: Any,
    tasks: Mapping[str, Any],
    settings: EvaluationSettings,
    *,
    limit: int | None,
    bootstrap_iters: int,
    progress: _Counter,
    apply_chat_template: bool = False,
) -> Any:
    """``lm_eval.evaluator.evaluate``, seeded.

    Not ``simple_evaluate``: that one describes the environment as well, which runs pip, git and the GPU's tools.
    """
    import numpy as np
    import torch
    from lm_eval import evaluator

    random.seed(settings.seed)
    np.random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    lm.set_cache_hook(progress)
    return evaluator.evaluate(
        lm=lm,
        task_dict=dict(tasks),
        limit=limit,
        bootstrap_iters=bootstrap_iters,
        log_samples=True,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=apply_chat_template,
    )


class _Counter:
    """Reports progress from the hook lm-eval calls for each answered request (meant for its response cache)."""

    def __init__(self, label: str, progress: Progress | None, total: int | None) -> None:
        self._label, self._progress, self._total, self._done = label, progress, total, 0

    def add_partial(self, attr: str, request: Any, result: Any) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._label, self._done, max(self._done, self._total or 0))

    def finish(self) -> None:
        """Report the end where lm-eval answered fewer requests than there were, equal ones being asked once."""
        if self._progress is not None and self._total is not None and self._done < self._total:
            self._progress(self._label, self._total, self._total)


@cache
def _lm_class() -> type[Any]:
    """lm-eval's HFLM with this package's tokenisation and without progress bars (made on demand: its import is
    slow).
    """
    import torch
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):  # type: ignore[misc]
        """``special``: whether prompts get the tokenizer's special tokens; None leaves tokenisation to lm-eval."""

        def __init__(self, model: Any, tokenizer: Any, batch_size: int, *, special: bool | None) -> None:
            self._special = special
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")

        def tok_encode(
            self,
            string: str,
            add_special_tokens: bool | None = None,
            left_truncate_len: int | None = None,
            **kwargs: Any,
        ) -> list[int]:
            if self._special is None:
                encoded: list[int] = super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
                return encoded
            special = self._special if add_special_tokens is None else add_special_tokens
            ids = prompt_ids(self.tokenizer, string, special=special)
            return ids[-left_truncate_len:] if left_truncate_len else ids

        def tok_batch_encode(
            self,
            strings: list[str],
            padding_side: str = "left",
            left_truncate_len: int | None = None,
            truncation: bool = False,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if self._special is None:
                batch: tuple[torch.Tensor, torch.Tensor] = super().tok_batch_encode(
                    strings, padding_side, left_truncate_len, truncation
                )
                return batch
            rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
            width = max(len(row) for row in rows)
            pad = self.tokenizer.pad_token_id
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            return ids, mask

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            if self._special is None:
                pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
                return pair
            return encode_pair(self.tokenizer, context, continuation, special=self._special)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    return Model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval without its log and its one progress bar that has no switch.

    What its warnings are about has been checked before (lengths, stops, pad tokens) or is meant (a loaded model).
    """
    import lm_eval.api.task

    log = logging.getLogger("lm_eval")
    level, bar = log.level, getattr(lm_eval.api.task, "tqdm", None)
    log.setLevel(logging.ERROR)
    if bar is not None:
        lm_eval.api.task.tqdm = lambda *args, **kwargs: bar(*args, **{**kwargs, "disable": True})
    try:
        yield
    finally:
        log.setLevel(level)
        if bar is not None:
            lm_eval.api.task.tqdm = bar


def _load_tasks(tasks: Sequence[str], include_path: Path | None, num_fewshot: int | None) -> Any:
    """lm-eval's tasks by name, with the number of few-shot examples set as ``simple_evaluate`` does."""
    from lm_eval.tasks import TaskManager

    unknown = list(tasks)
    if include_path is not None:
        # Indexing lm-eval's own thousands of task files takes seconds: only where a name needs it.
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        known = set(manager.all_tasks)
        unknown = [task for task in tasks if task not in known]
    if unknown:
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
        known = set(manager.all_tasks)
        unknown = [task for task in tasks if task not in known and not Path(task).is_file()]
    if unknown:
        names = sorted(known)
        raise ConfigError(
            [
                # The list of choices has thousands of names; its start is enough to show what they look like.
                Problem(f"task {task!r}", "is not known to lm-eval", did_you_mean(task, names)[:200])
                for task in unknown
            ]
        )
    try:
        loaded = manager.load(list(tasks))
    except Exception as error:  # data set scripts, the Hub and the network raise what they like
        remedy = "Check the network, or HF_DATASETS_CACHE for an offline copy"
        raise DataError([Problem(", ".join(tasks), f"cannot be loaded ({error})", remedy)]) from error
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:  # 0 in a task's own config means it must be 0
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


# --------------------------------------------------------------------------------------------------------- results


def _summarise(
    samples: list[EvaluationSample], batch_size: int, seconds: float, task: dict[str, Any]
) -> EvaluationResult:
    """Means and standard errors over the samples."""
    bad = [sample.index for sample in samples if not math.isfinite(sample.loglikelihood)]
    if bad:
        raise NumericalError(
            [
                Problem(
                    f"evaluation row {bad[0] + 1}",
                    f"its log-likelihood is not finite ({len(bad)} of {len(samples)} rows)",
                    "Check the adapter and the base for NaN weights, or use a wider precision",
                )
            ]
        )
    nats = [-sample.loglikelihood for sample in samples]
    loss, loss_stderr = _ratio(nats, [sample.tokens for sample in samples])
    bits, bits_stderr = _ratio([value / math.log(2) for value in nats], [sample.bytes for sample in samples])
    matches = [float(sample.exact_match) for sample in samples if sample.exact_match is not None]
    match, match_stderr = _ratio(matches, [1] * len(matches)) if matches else (None, None)
    return EvaluationResult(
        exact_match=match,
        exact_match_stderr=match_stderr,
        loss=loss,
        loss_stderr=loss_stderr,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=bits,
        bits_per_byte_stderr=bits_stderr,
        n=len(samples),
        batch_size=batch_size,
        seconds=seconds,
        task=task,
        samples=samples,
    )


def _ratio(values: Sequence[float], weights: Sequence[int]) -> tuple[float, float | None]:
    """``Σ values / Σ weights`` and its standard error, linearised over samples (Cochran, Sampling Techniques, ch. 6).

    With weights of 1 this is the mean and the usual s/√n, lm-eval's ``mean_stderr``.
    """
    n, total = len(values), sum(weights)
    ratio = sum(values) / total
    if n < 2:
        return ratio, None
    squares = sum((value - ratio * weight) ** 2 for value, weight in zip(values, weights, strict=True))
    return ratio, math.sqrt(squares * n / (n - 1)) / total


def _score(task: str, outcome: Mapping[str, Any]) -> TaskScore:
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
    return TaskScore(
        task=task,
        metrics=metrics,
        stderr=stderr,
        n=values.get("sample_len"),
        num_fewshot=outcome.get("n-shot", {}).get(task),
        version=None if version is None else str(version),
    )


def _template_hash(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> str:
    """SHA-256 of what turns rows into prompts: the instruction template, and the chat template where it is used."""
    parts: list[Any] = [CONTEXT_TEMPLATE, INSTRUCTION_TEMPLATE]
    if any(row.kind == "messages" for row in rows):
        parts.append(tokenizer.chat_template)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _versions() -> dict[str, str]:
    """Versions of the libraries that decide the numbers."""
    from importlib.metadata import version

    return {name: version(name) for name in ("lm_eval", "peft", "torch", "transformers")}
