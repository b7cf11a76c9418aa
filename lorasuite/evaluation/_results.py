"""Settings of an evaluation on held-out rows, and its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    pass


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

    def summary(self) -> dict[str, Any]:
        """Everything but the samples, as JSON-able values."""
        return self.model_dump(exclude={"samples"})

    def write_samples(self, path: Path) -> None:
        """Write the samples as JSONL, one line each."""
        lines = (json.dumps(sample.model_dump(), ensure_ascii=False) for sample in self.samples)
        Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
