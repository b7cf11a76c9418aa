"""Settings of an evaluation, and the results on held-out rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from lorasuite.errors import NumericalError, Problem

#: Tokens that an answer may have beyond the longest of the rows' own: enough to tell that it does not end there. Fewer
#: than its own would make a row's answer impossible, and more are never equal to one.
BEYOND_LONGEST = 16


class EvaluationSettings(BaseModel):
    """How to evaluate. Fixed batch size: padding changes results in the last digits, so it is recorded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(16, ge=1, description="rows evaluated together; fixed and recorded")
    max_new_tokens: PositiveInt | Literal["auto"] = Field(
        "auto",
        description=f"of an answer; auto: {BEYOND_LONGEST} more than the longest of the rows' own has; at most half of "
        "the model's context",
    )
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


class EvaluationSummary(BaseModel):
    """One adapter's (or the bare base's) scores. Standard errors are None for fewer than two samples."""

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


class EvaluationResult(EvaluationSummary):
    """The scores and the samples they come from."""

    samples: list[EvaluationSample]

    @classmethod
    def of(
        cls, samples: list[EvaluationSample], batch_size: int, seconds: float, task: dict[str, Any]
    ) -> EvaluationResult:
        """Means and standard errors over the samples.

        Args:
            samples: at least one.
            batch_size: rows evaluated together.
            seconds: that it took.
            task: what was asked.

        Raises:
            NumericalError: if a log-likelihood is not finite.
        """
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
        return cls(
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

    def summary(self) -> dict[str, Any]:
        """Everything but the samples, as JSON-able values."""
        return self.model_dump(exclude={"samples"})

    def write_samples(self, path: Path) -> None:
        """Write the samples as JSONL, one line each."""
        write_jsonl(self.samples, path)


def write_jsonl(samples: Iterable[BaseModel], path: Path) -> None:
    """Write models as JSONL, one line each."""
    lines = (json.dumps(sample.model_dump(), ensure_ascii=False) for sample in samples)
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


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
