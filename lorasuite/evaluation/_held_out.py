"""Evaluation on held-out rows through lm-eval (EleutherAI's lm-evaluation-harness).

Rows become lm-eval tasks in memory: greedy ``generate_until`` scored by exact match, ``loglikelihood`` of the
completion for the held-out loss, ``loglikelihood_rolling`` for text rows. So no data set is looked up anywhere, and a
result means what it means in every other lm-eval report. Prompts are tokenised by :mod:`lorasuite.data`, as in
training. Several adapters and the bare base share one load of the base model.

Importing this module loads neither torch, transformers nor lm-eval.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasuite.data import (
    CONTEXT_TEMPLATE,
    INSTRUCTION_TEMPLATE,
    Row,
    encode_pair,
    end_tokens,
    fingerprint_rows,
    prompt_ids,
)
from lorasuite.errors import DataError, Problem
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
from lorasuite.evaluation._results import BEYOND_LONGEST, EvaluationResult, EvaluationSample, EvaluationSettings
from lorasuite.progress import EvaluationProgress

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: Rows evaluated together: prompts the tokenizer completes with special tokens, conversations whose template spells
#: them out, and plain text.
_Group = Literal["plain", "chat", "text"]


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


def evaluate(
    base: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: EvaluationSettings,
    *,
    adapters: Mapping[str, Path | None],
    device: str | torch.device = "cpu",
    name: str = "heldout",
    progress: EvaluationProgress | None = None,
    trust_remote_code: bool = False,
) -> dict[str, EvaluationResult]:
    """Evaluate adapters (a PEFT directory each; None: the bare base) on rows, in the mapping's order.

    Decoding is greedy, without few-shot examples, and stops at an end token (the tokenizer's, the model's, and for
    conversations the chat template's end of turn); at a newline too where no completion has one. The loss is over the
    completion without its EOS. For text rows it is over the whole text given a BOS (or EOS, where there is no BOS),
    in windows of the model's context. Embeddings are never resized.

    Args:
        base: a model, which is moved to ``device`` and otherwise given back as it came, or where to load it from.
        tokenizer: the base's; it is not changed.
        rows: with their answers.
        settings: of the evaluation.
        adapters: PEFT directories by name.
        device: ``cpu`` or ``cuda``.
        name: of the rows, in the results.
        progress: told of every answered request.
        trust_remote_code: whether code of the base's own may run.

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
    tokenizer = evaluation_tokenizer(tokenizer, generate=settings.generate and any(r.kind != "text" for r in used))
    documents = _documents(used, tokenizer)
    results: dict[str, EvaluationResult] = {}
    with base_model(base, adapters, device, trust_remote_code) as model:
        _check_lengths(documents, context_length(model, tokenizer))
        plan = _generation_plan(documents, model, tokenizer, settings)
        for label, adapter in adapters.items():
            with adapted(model, adapter, device) as tuned, quiet():
                started = time.perf_counter()
                samples = _run(tuned, tokenizer, documents, plan, settings, name, label, progress)
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
                "versions": versions(),
            }
            results[label] = EvaluationResult.of(samples, settings.batch_size, seconds, task)
    return results


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
    context = context_length(model, tokenizer)
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
        if group == "plain":  # of rows that a template made: where it is no one token, its text ends an answer
            until += sorted({document.suffix.strip() for document in members} - {""})
        tokens = settings.max_new_tokens
        if tokens == "auto":
            tokens = max(document.tokens for document in members) + BEYOND_LONGEST
        plan[group] = {
            "until": until,
            "max_gen_toks": min(tokens, max(1, context // 2)),
            "do_sample": False,
            "temperature": 0.0,
            # Given explicitly: lm-eval's own EOS check reads text from which special tokens have been removed.
            "eos_token_id": sorted(end_tokens(model, tokenizer, [document.suffix for document in members])),
        }
    return plan


def _run(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[_Document],
    plan: Mapping[str, dict[str, Any]],
    settings: EvaluationSettings,
    name: str,
    label: str,
    progress: EvaluationProgress | None,
) -> list[EvaluationSample]:
    """Every document's sample, in order."""
    total = len(documents) + sum(document.group in plan for document in documents)
    counter = RequestCounter(label, progress, total)
    likelihoods: dict[int, float] = {}
    outputs: dict[int, str] = {}
    for group in ("plain", "chat", "text"):
        members = [document for document in documents if document.group == group]
        if not members:
            continue
        lm = lm_class()(model, tokenizer, settings.batch_size, special=group == "plain")
        tasks = {f"{name}_{group}_loss": _likelihood_task(f"{name}_{group}_loss", members, rolling=group == "text")}
        if group in plan:
            tasks[f"{name}_{group}"] = _generation_task(f"{name}_{group}", members, plan[group])
        for task in tasks.values():
            task.set_fewshot_seed(seed=settings.seed)
        outcome = run_lm_eval(lm, {"tasks": tasks}, seed=settings.seed, limit=None, bootstrap_iters=0, progress=counter)
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


def _template_hash(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> str:
    """SHA-256 of what turns rows into prompts: the instruction template, and the chat template where it is used."""
    parts: list[Any] = [CONTEXT_TEMPLATE, INSTRUCTION_TEMPLATE]
    if any(row.kind == "messages" for row in rows):
        parts.append(tokenizer.chat_template)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
