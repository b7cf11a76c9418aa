"""Settings of a fine-tuning run, and what it reports. Importing this loads neither torch nor transformers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from typing_extensions import TypedDict

#: Starts whose factors are taken out of the base's weights.
TAKEN_OUT = ("pissa", "olora", "loftq")
#: Passes over the rows where nobody says how many (arXiv 2505.13515).
EPOCHS = 3
#: What follows the fine-tune on rows that the teacher wrote.
SecondStep = Literal["none", "on-policy", "cached"]


class FinetuneSettings(BaseModel):
    """Hyperparameters of one fine-tuning run; the defaults are the paper's lightweight fine-tuning, but for
    ``batch_size``, where the paper's 16 was behind 8 (docs/evidence.md)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    batch_size: int = Field(8, ge=1, description="rows per optimiser step")
    micro_batch_size: PositiveInt | Literal["auto"] = Field(
        "auto", description="most rows per forward pass; auto: batch_size, or as many as fit into memory"
    )
    epochs: float | None = Field(
        None,
        gt=0,
        description=f"passes over the rows; if unset {EPOCHS}, and fewer over more rows than 300 that a teacher writes "
        "unasked",
    )
    max_steps: int | None = Field(None, ge=1, description="optimiser steps, in place of epochs")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="of the learning rate, after warm-up"
    )
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="share of the steps; not together with warmup_steps")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    max_grad_norm: float = Field(1.0, ge=0, description="0 switches clipping off")
    cutoff: int = Field(256, ge=2, description="tokens kept of an example")
    seed: int = Field(42, ge=0, lt=2**32, description="of data order and fresh weights; the migration's if unset")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 on a GPU that has it, on a CPU by dtype"
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto", description="true, false or auto: less memory for more time; auto: where one row does not fit otherwise"
    )
    loraplus_lr_ratio: float | None = Field(
        None, ge=1, description="LoRA+: learning rate of B over that of A (arXiv 2402.12354 suggests 16)"
    )
    init: str = Field(
        "default",
        pattern=r"^(default|pissa|pissa_niter_[1-9]\d*|olora|loftq|eva)$",
        description="how a fresh LoRA starts: default (B = 0), pissa, pissa_niter_N (its SVD in N steps), olora, loftq "
        "(on a CUDA GPU, lorasuite[bnb]) or eva; written as plain LoRA, of twice the rank after pissa, olora and loftq",
    )
    liger: bool = Field(False, description="Liger's kernels in place of the model's own; on a GPU, lorasuite[liger]")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = Field(
        "none", description="where losses are logged as well"
    )
    distillation: float = Field(
        0.0, ge=0, le=1, description="weight of the divergence from the teacher's distributions, where there are any"
    )
    distillation_temperature: float = Field(1.0, gt=0, description="of teacher and student in that divergence")
    token_weights: Literal["none", "excess"] = Field(
        "none", description="of rows that the teacher wrote; excess: tokens that the adapter changed most count most"
    )
    checkpoint_steps: int | None = Field(None, ge=1, description="steps between checkpoints; None: every epoch")

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneSettings:
        if self.micro_batch_size != "auto" and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError("give warmup_ratio or warmup_steps, not both")
        return self

    @property
    def passes(self) -> float:
        """Passes over the rows."""
        return EPOCHS if self.epochs is None else self.epochs

    def computed(self) -> dict[str, Any]:
        """As JSON, for a stage's key: without what only decides which inputs the stage is given."""
        return {**self.model_dump(mode="json", exclude={"token_weights"}), "epochs": self.passes}


class Loss(TypedDict):
    """One point of the loss curve: mean nats per label token over the step's batch, and the step's learning rate."""

    step: int
    loss: float
    learning_rate: float


class Validation(TypedDict):
    """One point of the held-out curve: nats per label token after so many epochs."""

    epoch: int
    loss: float


class FinetuneResult(BaseModel):
    """What a fine-tuning run did; JSON by ``model_dump()``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(description="optimiser steps, those of an interrupted first attempt included")
    learning_rate: float = Field(description="peak learning rate asked for")
    losses: list[Loss] = Field(description="one entry per step")
    validation: list[Validation] = Field(default=[], description="held-out loss before training and after each epoch")
    validation_loss: float | None = Field(description="nats per label token after training; None without rows")
    seconds: float = Field(description="wall time of this call's training, without an interrupted first attempt")
    peak_memory_bytes: int = Field(description="device memory (CUDA) or the process's resident set so far (CPU)")
    samples: int = Field(description="rows trained on")
    rehearsed: int = Field(0, description="texts of the bare base's own that were read beside them")
    dropped: int = Field(description="rows whose completion lay wholly beyond the cut-off")
    distilled: int = Field(description="rows trained on with the teacher's distributions")
    trainable_parameters: int
    precision: Literal["fp32", "bf16"]
    micro_batch_size: int | None = Field(None, description="most rows of a forward pass; None: no step was made")
    resumed_from: int | None = Field(description="step of the checkpoint this call started from; None: from scratch")


class SecondStepResult(BaseModel):
    """What a second step came to; JSON by ``model_dump()``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: SecondStep
    kept: bool = Field(description="whether its adapter is the result, rather than that of the first step")
    measured_on: Literal["own rows", "written rows", "nothing"] = Field(
        description="held-out rows: cross-entropy on the user's, or the divergence from the teacher on what it wrote; "
        "nothing where that was not asked for, or there are too few rows"
    )
    held_out: int = Field(description="rows compared by")
    before: float | None = Field(description="on them, nats a label, of the first step without them")
    after: float | None = Field(description="the same after a second step without them; None: it diverged")
    training: FinetuneResult | None = Field(description="the second step on all rows; None where it is not kept")
