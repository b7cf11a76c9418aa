"""General ability: what an adapter costs its base on text, and on a task, that it was not trained for.

Fine-tunes make a model worse at what their rows are not about (catastrophic forgetting; Biderman et al. 2024, "LoRA
Learns Less and Forgets Less", arXiv:2405.09673). So an adapter that replaces another may not cost more than that one
did: old base → old base + adapter against new base → new base + adapter, each pair on the same texts.

Texts are cut by characters and scored in bits per byte: then both bases read the same text, whatever their tokenizers,
and what was measured of a bare base serves every adapter and every pair.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from lorasuite.data import IGNORED, Row, fingerprint_rows, prompt_ids
from lorasuite.errors import DataError, Problem
from lorasuite.evaluation._arms import PUBLISHED_ARMS, Arm
from lorasuite.evaluation._comparison import compare_costs, metrics
from lorasuite.evaluation._harness import adapted, base_model, context_length, evaluation_tokenizer, versions
from lorasuite.evaluation._measures import TASK_METRICS, Interval
from lorasuite.evaluation._results import EvaluationResult, EvaluationSample, EvaluationSummary
from lorasuite.evaluation._tasks import TaskSummary
from lorasuite.progress import EvaluationProgress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The metric of texts; that of a task is lm-eval's.
BITS = "bits_per_byte"


class GeneralSettings(BaseModel):
    """How much is read to see what adapters cost of general ability."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int = Field(64, ge=1, description="general texts read at most, the first ones")
    characters: int = Field(
        512, ge=16, description="characters of a general text read at most, some 120 tokens of English"
    )
    documents: int = Field(100, ge=1, description="documents of general_task at most, the first ones")


class GeneralCost(BaseModel):
    """What two adapters cost their bases, on the same texts or documents; what is positive is a loss."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str | None = Field(description="None for general text")
    metric: str = Field(description="bits_per_byte of text; of a task what lm-eval calls it, in shares of 1")
    arm: Arm = Field(description="the new adapter that is published")
    n: int = Field(description="texts or documents")
    old: float = Field(description="what the old adapter costs the old base")
    new: float = Field(description="what the new adapter costs the new base")
    excess: float = Field(description="how much more the new adapter costs")
    interval: Interval | None = Field(description="of the excess: paired bootstrap, 95 %; None for one sample")


class General(BaseModel):
    """General ability as a record keeps it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str | None = Field(None, description="what the texts are; None where none were read")
    missing: list[str] = Field([], description="what was not measured, and why")
    text: dict[Arm, EvaluationSummary] = Field({}, description="on general text, without answers")
    tasks: dict[Arm, dict[str, TaskSummary]] = Field({}, description="on general_task")
    costs: list[GeneralCost] = []


def evaluate_text(
    base: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    adapters: Mapping[str, Path | None],
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    progress: EvaluationProgress | None = None,
    trust_remote_code: bool = False,
) -> dict[str, EvaluationResult]:
    """Bits per byte of texts, of a base with adapters (a PEFT directory each; None: bare), in the mapping's order.

    Every token is scored, the first given a BOS (or EOS, where there is no BOS). A text longer than the model's context
    is read in windows of it that do not overlap. The head reads some positions at a time, and no more logits are kept.

    Args:
        base: a model, which is moved to ``device`` and otherwise given back as it came, or where to load it from.
        tokenizer: the base's; it is not changed.
        texts: as they are read, not cut.
        adapters: PEFT directories by name.
        batch_size: windows read at once.
        device: ``cpu`` or ``cuda``.
        progress: told of every arm.
        trust_remote_code: whether code of the base's own may run.

    Raises:
        DataError: no texts, empty ones, or a tokenizer without BOS and EOS.
        ConfigError: no adapters to evaluate, or a device that is not there.
        AdapterError: an adapter does not fit the base.
        CheckpointError: the base cannot be loaded.
        NumericalError: the model's likelihoods are NaN or infinite.
    """
    if not texts or not all(texts):
        what = "has nothing to score" if texts else "there are none"
        raise DataError([Problem("general texts", what, "Give texts that are not empty")])
    tokenizer = evaluation_tokenizer(tokenizer, generate=False)
    results: dict[str, EvaluationResult] = {}
    with base_model(base, adapters, device, trust_remote_code) as model:
        windows, owners = _windows(texts, tokenizer, context_length(model, tokenizer))
        for label, adapter in adapters.items():
            with adapted(model, adapter, device) as tuned:
                started = time.perf_counter()
                scores = _likelihoods(tuned, windows, batch_size)
                seconds = time.perf_counter() - started
            samples = []
            for index, text in enumerate(texts):
                own = [at for at, owner in enumerate(owners) if owner == index]
                samples.append(
                    EvaluationSample(
                        index=index, prompt="", target=text, output=None, exact_match=None,
                        loglikelihood=sum(scores[at] for at in own),
                        tokens=sum(len(windows[at]["input_ids"]) - 1 for at in own),
                        bytes=len(text.encode("utf-8")),
                    )
                )  # fmt: skip
            task = {
                "name": "general text",
                "rows_sha256": fingerprint_rows([Row(kind="text", text=text) for text in texts]),
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
                "device": next(model.parameters()).device.type,
                "versions": versions(),
            }
            results[label] = EvaluationResult.of(samples, batch_size, seconds, task)
            if progress is not None:
                progress(label, len(texts), len(texts))
    return results


def _windows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, context: int
) -> tuple[list[dict[str, list[int]]], list[int]]:
    """Encoded windows whose every token but the first is scored, and the text that each is of."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    size = max(1, context - 1)
    windows, owners = [], []
    for index, text in enumerate(texts):
        ids = [int(start), *prompt_ids(tokenizer, text, special=False)]
        for at in range(0, len(ids) - 1, size):
            part = ids[at : at + size + 1]
            windows.append({"input_ids": part, "labels": [IGNORED, *part[1:]], "attention_mask": [1] * len(part)})
            owners.append(index)
    return windows, owners


def _likelihoods(model: Any, windows: Sequence[dict[str, list[int]]], batch_size: int) -> list[float]:
    """Log-likelihood of each window, in nats."""
    from lorasuite.training import label_losses

    return [-float(losses.double().sum()) for losses in label_losses(model, windows, batch_size)]


def general_cost(task: str | None, arms: Mapping[Arm, Sequence[Mapping[str, Any]]]) -> GeneralCost | None:
    """What the published adapter costs beside what the old one cost, from the samples of four arms.

    Args:
        task: the task that the samples are of; None: of general text.
        arms: the samples of both bases, bare and with their adapters.

    Returns:
        the cost; None where the task has no metric that is better when higher (:data:`TASK_METRICS`).

    Raises:
        DataError: if the arms' samples are not of the same texts or documents.
        KeyError: if an arm is missing.
    """
    arm = next(arm for arm in PUBLISHED_ARMS if arm in arms)
    four = [arms[Arm.OLD], arms[Arm.OLD_ADAPTER], arms[Arm.NEW], arms[arm]]
    known = [name for name in metrics(four[0]) if name.split(",")[0] in ((BITS,) if task is None else TASK_METRICS)]
    if not known:
        return None
    old, new, interval = compare_costs(*four, metric=known[0])
    sign = 1 if task is None else -1  # bits are better when fewer, scores when higher
    ends = None if interval is None else sorted(sign * end for end in interval)
    return GeneralCost(
        task=task, metric=known[0], arm=arm, n=len(four[0]), old=sign * old, new=sign * new, excess=sign * (new - old),
        interval=None if ends is None else (ends[0], ends[1]),
    )  # fmt: skip


def held_out_texts(texts: Sequence[str], read: Sequence[str], settings: GeneralSettings) -> tuple[list[str], int]:
    """The texts that adapters' costs are measured on, cut, and how many were left out as not held out.

    Args:
        texts: in order; empty and repeated ones are dropped without being counted.
        read: what something was fitted to, trained on or chosen by: a text that begins as one of them is left out.
        settings: how many there are at most, and of what length.
    """
    seen = {_beginning(text) for text in read}
    every = [text for text in dict.fromkeys(texts) if text.strip()]
    spare = [text for text in every if _beginning(text) not in seen]
    kept = dict.fromkeys(text for whole in spare if (text := whole.strip()[: settings.characters]))
    return list(kept)[: settings.samples], len(every) - len(spare)


def _beginning(text: str) -> str:
    """What tells texts apart that were cut at different places."""
    return " ".join(text[:256].split())[:128]
