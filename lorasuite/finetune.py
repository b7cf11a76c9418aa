"""Lightweight fine-tuning (LFT): a few steps on a migrated adapter, or a fresh LoRA as the control.

Defaults are LoRASuite's (arXiv 2505.13515): AdamW, linear decay without warm-up, learning rate 1e-3, batches of 16,
3 epochs, 256 tokens. The training loop is ``transformers.Trainer``; this module adds what a pipeline stage needs around
it: checkpoints that are only trusted when complete, the same result after an interruption, a loss curve, and errors
instead of silent no-ops.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import TypedDict

from lorasuite.data import IGNORED, Row, encode_rows
from lorasuite.errors import AdapterError, ConfigError, NumericalError, OutputError, Problem

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorasuite.distillation import SoftLabels

logger = logging.getLogger(__name__)

#: ``progress(step, total_steps, loss)``, called after each optimiser step, before a checkpoint of it is written.
Progress = Callable[[int, int, float], None]

#: Present in a checkpoint only once every other file of it is on disk.
_COMPLETE = "complete.json"
#: Names the run a work directory belongs to, so that a checkpoint of another run is never resumed.
_RUN = "run.json"


class FinetuneSettings(BaseModel):
    """Hyperparameters of one fine-tuning run; the defaults are the paper's lightweight fine-tuning."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    batch_size: int = Field(16, ge=1, description="rows per optimiser step")
    micro_batch_size: int | None = Field(None, ge=1, description="rows per forward pass; None: batch_size")
    epochs: float = Field(3, gt=0, description="passes over the rows")
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
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device has it")
    gradient_checkpointing: bool = Field(False, description="less memory for more time")
    distillation: float = Field(
        0.0, ge=0, le=1, description="weight of the divergence from the teacher's distributions, where there are any"
    )
    distillation_temperature: float = Field(1.0, gt=0, description="of teacher and student in that divergence")
    checkpoint_steps: int | None = Field(None, ge=1, description="steps between checkpoints; None: every epoch")

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneSettings:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError("give warmup_ratio or warmup_steps, not both")
        return self


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
    dropped: int = Field(description="rows whose completion lay wholly beyond the cut-off")
    distilled: int = Field(description="rows trained on with the teacher's distributions")
    trainable_parameters: int
    precision: Literal["fp32", "bf16"]
    resumed_from: int | None = Field(description="step of the checkpoint this call started from; None: from scratch")


@dataclass(frozen=True)
class _Plan:
    """What the settings mean on this device."""

    device: torch.device
    bf16: bool
    micro_batch: int
    accumulation: int


# ---------------------------------------------------------------------------------------------------- model loading


def attach_adapter(
    model: PreTrainedModel, adapter: Path, *, device: str | torch.device = "cpu", trainable: bool = False
) -> PeftModel:
    """Wrap a model in a saved PEFT adapter, refusing one of which any tensor does not find its place.

    PEFT itself only warns about missing tensors and is silent about superfluous ones, some of which would overwrite
    the base's. The model's modules are wrapped in place; :func:`detach_adapter` restores them.

    Raises:
        AdapterError: the directory is no PEFT adapter, does not fit the model, or has missing or unexpected tensors.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils import get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights
    from safetensors import SafetensorError

    adapter = Path(adapter)
    remedy = "Use an adapter made for this base model"
    if not (adapter / "adapter_config.json").is_file():
        raise AdapterError([Problem(str(adapter), "holds no adapter_config.json", "Give a PEFT adapter directory")])
    try:
        saved = set(load_peft_weights(str(adapter), device="cpu"))
        own = tuple(f".{module}." for module in PeftConfig.from_pretrained(str(adapter)).modules_to_save or ())
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise AdapterError([Problem(str(adapter), f"cannot be read ({error})", remedy)]) from error
    # Checked first: PEFT would load such a tensor into the base itself, and taking the adapter out leaves it there.
    prefix = "base_model.model."
    inside = {name.removeprefix(prefix) for name in saved if not any(module in f".{name}" for module in own)}
    before = model.state_dict()
    overwritten = sorted(inside & set(before))
    if overwritten:
        what = f"would overwrite {len(overwritten)} tensors of the base, such as {overwritten[0]!r}"
        raise AdapterError([Problem(str(adapter), what, "Save it with save_embedding_layers=False")])
    # What PEFT changes of the base on purpose (trained biases, weights of PiSSA and its like) is put back on leaving.
    replaced = {name.replace(".base_layer.", ".") for name in inside if ".base_layer." in name}
    if _changes_weights(adapter):
        factor = ".lora_A.weight"
        replaced |= {name.removesuffix(factor) + ".weight" for name in inside if name.endswith(factor)}
    kept = {name: before[name].detach().to("cpu", copy=True) for name in sorted(replaced & set(before))}
    try:
        wrapped = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable, torch_device=str(device))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        _unwrap(model)
        model.load_state_dict(kept, strict=False)
        raise AdapterError([Problem(str(adapter), f"does not fit the base model ({error})", remedy)]) from error
    wrapped.lorasuite_base_tensors = kept
    copies = {name for name in saved if name.endswith(".base_layer.weight")}  # of the embeddings, beside their LoRA
    expected = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False)) | copies
    problems = [
        Problem(str(adapter), f"{len(names)} {what} tensors, such as {sorted(names)[0]!r}", remedy)
        for what, names in (("missing", expected - saved), ("unexpected", saved - expected))
        if names
    ]
    if problems:
        detach_adapter(wrapped)
        raise AdapterError(problems)
    return wrapped


def detach_adapter(wrapped: PeftModel) -> PreTrainedModel:
    """The base model without its PEFT modules, as it was before :func:`attach_adapter` or ``get_peft_model``.

    Not PEFT's ``unload``: that one leaves an adapter's fully trained modules (``modules_to_save``) in the base.
    """
    model: PreTrainedModel = wrapped.get_base_model()
    kept = getattr(wrapped, "lorasuite_base_tensors", {})
    _unwrap(model)
    model.load_state_dict(kept, strict=False)
    return model


@contextlib.contextmanager
def attached(model: PreTrainedModel, adapter: Path, device: str | torch.device = "cpu") -> Iterator[PeftModel]:
    """The model with an adapter, unmerged, while the context lasts; raises as :func:`attach_adapter`."""
    wrapped = attach_adapter(model, adapter, device=device)
    try:
        yield wrapped.eval()
    finally:
        detach_adapter(wrapped)


def _changes_weights(adapter: Path) -> bool:
    """Whether PEFT changes the base's weights when it loads the adapter, as PiSSA's initialisation does."""
    from lorasuite.adapter_types import CHANGES_BASE
    from lorasuite.checkpoint import read_json

    init = read_json(adapter / "adapter_config.json").get("init_lora_weights")
    return isinstance(init, str) and bool(CHANGES_BASE.search(init))


def _unwrap(model: PreTrainedModel) -> None:
    """Take PEFT's modules out of a model that was wrapped in place, whatever state wrapping or training left it in."""
    done: list[str] = []
    for name, module in list(model.named_modules()):
        if not name or any(name.startswith(f"{outer}.") for outer in done):
            continue
        inner = module
        while (below := getattr(inner, "base_layer", getattr(inner, "original_module", None))) is not None:
            inner = below
        if inner is not module:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, inner)
            done.append(name)
    if hasattr(model, "peft_config"):
        del model.peft_config


@contextlib.contextmanager
def restored(model: PreTrainedModel, *, checkpointing: bool = False) -> Iterator[None]:
    """Give a caller's model back as it was: flags, cache setting, mode and modules."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training, use_cache = model.training, getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        _unwrap(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(name, parameter.requires_grad))
            parameter.grad = None
        if checkpointing:
            # Named activation checkpointing since transformers 5.2x, gradient checkpointing before.
            getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
        if use_cache is not None:
            model.config.use_cache = use_cache
        model.train(training)


# --------------------------------------------------------------------------------------------------------- training


def finetune(
    base: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: FinetuneSettings,
    *,
    adapter: Path | None,
    lora: LoraConfig | None,
    output: Path,
    work_dir: Path,
    device: str | torch.device = "cpu",
    validation_rows: Sequence[Row] | None = None,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
    soft_labels: SoftLabels | None = None,
    stop_after: int | None = None,
) -> FinetuneResult:
    """Fine-tune an existing adapter (``adapter``) or a freshly initialised one (``lora``: the scratch control).

    The tuned PEFT adapter is written to ``output``, which appears only once it is whole. ``work_dir`` holds the
    checkpoints of a run in progress: called again with the same arguments after an interruption, the run goes on from
    its last complete checkpoint and ends in the same tensors (bit for bit on the CPU) as an undisturbed one;
    checkpoints of any other run found there are removed. The base's weights never change. A model passed as ``base``
    is moved to ``device`` and otherwise given back as it came. With ``soft_labels`` and ``settings.distillation`` the
    loss of the rows they know is :func:`lorasuite.distillation.distilled_loss`; ``validation_loss`` never is.
    ``stop_after`` ends the run after so many epochs, on the schedule of the whole run; 0 writes the start itself.
    With ``validation_rows`` their loss is taken before the first step and after every epoch.

    Determinism: same seed, inputs and machine give the same tensors on the CPU. With ``micro_batch_size`` the loss is
    normalised by the label tokens of the whole batch, so accumulation changes it by rounding only.

    Raises:
        ConfigError: not exactly one of ``adapter`` and ``lora``, or a device or precision that is not there.
        OutputError: ``output`` exists.
        DataError: no usable rows.
        AdapterError: the adapter does not fit the base, or leaves nothing to train.
        CheckpointError: the base cannot be loaded.
        NumericalError: a loss is NaN or infinite; names the step.
    """
    import torch
    from transformers import set_seed

    from lorasuite.checkpoint import load_model

    plan = _plan(settings, device)
    if (adapter is None) == (lora is None):
        raise ConfigError(
            [Problem("finetune", "needs exactly one of adapter and lora", "Give a starting point or a LoraConfig")]
        )
    output, work_dir = Path(output), Path(work_dir)
    if output.exists():
        raise OutputError([Problem(str(output), "exists already", "Choose another directory, or remove it")])
    encoded = encode_rows(rows, tokenizer, settings.cutoff)

    given = not isinstance(base, str)
    dtype = torch.bfloat16 if plan.bf16 else torch.float32
    if isinstance(base, str):
        model = load_model(base, str(plan.device), dtype, trust_remote_code)
    else:
        model = base.to(plan.device)
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(plan.device)
    with restored(model, checkpointing=settings.gradient_checkpointing) if given else contextlib.nullcontext():
        # Seeded here too: a fresh LoRA's A is drawn before the Trainer seeds.
        set_seed(settings.seed)
        wrapped = _wrap(model, adapter, lora, plan)
        trainable = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
        if not trainable:
            raise AdapterError(
                [Problem(str(adapter or "lora"), "leaves no parameter to train", "Check its target modules")]
            )
        if not settings.distillation:
            soft_labels = None
        start = _prepare_work_dir(work_dir, settings, encoded.examples, wrapped, soft_labels, stop_after)
        started = time.perf_counter()
        curve: list[Validation] = []

        def validate(epoch: int) -> None:
            if validation_rows:
                loss = validation_loss(wrapped, tokenizer, validation_rows, settings.cutoff, plan.micro_batch)
                curve.append(Validation(epoch=epoch, loss=loss))

        def after_epoch(epoch: int) -> bool:
            validate(epoch)
            return stop_after is not None and epoch >= stop_after

        if start is None:
            validate(0)

        trainer = _trainer(wrapped, encoded.examples, settings, plan, work_dir, progress, soft_labels, after_epoch)
        if stop_after != 0:
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        seconds = time.perf_counter() - started
        losses = [
            Loss(step=entry["step"], loss=entry["loss"], learning_rate=entry["learning_rate"])
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        steps = int(trainer.state.global_step)
        # The last step's gradient can be bad after a good loss, and no later loss would tell.
        bad = [name for name, value in wrapped.named_parameters() if value.requires_grad and not value.isfinite().all()]
        if bad:
            remedy = f"Lower the learning rate (now {settings.learning_rate:g})"
            raise NumericalError([Problem(f"fine-tuning step {steps}", f"left {bad[0]} not finite", remedy)])
        result = FinetuneResult(
            steps=steps,
            learning_rate=settings.learning_rate,
            losses=losses,
            validation_loss=curve[-1]["loss"] if curve else None,
            validation=curve,
            seconds=seconds,
            peak_memory_bytes=_peak_memory(plan.device),
            samples=len(encoded.examples),
            dropped=len(encoded.cut_off),
            distilled=sum(e["input_ids"] in soft_labels for e in encoded.examples) if soft_labels else 0,
            trainable_parameters=trainable,
            precision="bf16" if plan.bf16 else "fp32",
            resumed_from=int(start.name.rpartition("-")[2]) if start else None,
        )
        save_adapter(wrapped, output)
    # Only now: until the output is in place the last checkpoint is the run's only trace.
    _clear_work_dir(work_dir)
    return result


def save_adapter(wrapped: PeftModel, output: Path) -> None:
    """Write a PEFT adapter (safetensors and config) so that ``output`` never exists half-written.

    PEFT's template ``README.md`` is left out: its placeholders would pass for a model card.

    Raises:
        OutputError: ``output`` exists.
    """
    output = Path(output)
    if output.exists():
        raise OutputError([Problem(str(output), "exists already", "Choose another directory, or remove it")])
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        # "auto" would look the base up on the Hub; nothing here ever resizes embeddings.
        wrapped.save_pretrained(str(partial), safe_serialization=True, save_embedding_layers=False)
        (partial / "README.md").unlink(missing_ok=True)
        partial.chmod(0o755)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def validation_loss(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    cutoff: int,
    batch_size: int,
) -> float:
    """Mean loss in nats per label token over all rows, encoded as for training (so the EOS counts).

    Every token weighs the same, whatever the batch it falls in.

    Raises:
        DataError: no usable rows.
        NumericalError: the loss is NaN or infinite.
    """

    total, count = 0.0, 0
    for _, labels, logits in read_batches(model, encode_rows(rows, tokenizer, cutoff).examples, batch_size):
        total += float(_summed_loss(logits, labels))
        count += int((labels[:, 1:] != IGNORED).sum())
    loss = total / count
    if not math.isfinite(loss):
        raise NumericalError(
            [Problem("validation loss", f"is {loss}", "Lower the learning rate, or check the base model")]
        )
    return loss


def read_batches(
    model: PreTrainedModel | PeftModel, examples: Sequence[dict[str, list[int]]], batch_size: int
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """What a model in evaluation mode makes of examples, without gradients: each batch's numbers of its examples, its
    labels ``(batch, tokens)`` and logits ``(batch, tokens, V)``. Longest first: least padding, and memory runs out at
    once or not at all.
    """
    import torch

    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda n: len(examples[n]["input_ids"]), reverse=True)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            batch = {key: value.to(device) for key, value in collate([examples[n] for n in members]).items()}
            labels = batch.pop("labels")
            with torch.no_grad():
                logits = model(**batch).logits
            yield members, labels, logits
    finally:
        model.train(training)


def collate(examples: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad examples on the right to the longest: three ``(batch, tokens)`` int64 tensors.

    Padding is token 0, masked in attention and labels: it needs no pad token and can never be seen.
    """
    import torch

    width = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {
        key: torch.tensor([example[key] + [value] * (width - len(example[key])) for example in examples])
        for key, value in fill.items()
    }


def _summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed next-token cross-entropy in nats, in float32; ``logits (batch, tokens, V)``, ``labels (batch,
    tokens)``.
    """
    import torch

    loss: torch.Tensor = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss


def _plan(settings: FinetuneSettings, device: str | torch.device) -> _Plan:
    """Check the device and fix precision and batch split; ConfigError where they are impossible."""
    import torch

    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ConfigError([Problem(f"device {device}", "is not supported for training", "Use cpu or cuda")])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError([Problem(f"device {device}", "is not available", "Use device cpu")])
    if device.index not in (None, 0):
        # The Trainer always takes the first visible GPU; moving the model elsewhere would fail half-way.
        raise ConfigError(
            [
                Problem(
                    f"device {device}",
                    "cannot be chosen by its index",
                    f"Set CUDA_VISIBLE_DEVICES={device.index} and use device cuda",
                )
            ]
        )
    bf16_there = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if settings.precision == "bf16" and not bf16_there:
        raise ConfigError([Problem("precision bf16", f"is not available on {device}", "Use precision auto or fp32")])
    micro = settings.micro_batch_size or settings.batch_size
    return _Plan(
        device=device,
        bf16=bf16_there and settings.precision != "fp32",
        micro_batch=micro,
        accumulation=settings.batch_size // micro,
    )


def _wrap(model: PreTrainedModel, adapter: Path | None, lora: LoraConfig | None, plan: _Plan) -> PeftModel:
    """The model with its trainable adapter, the base frozen."""
    from peft import get_peft_model

    if adapter is not None:
        wrapped = attach_adapter(model, Path(adapter), device=plan.device, trainable=True)
    else:
        try:
            wrapped = get_peft_model(model, lora)
        except (ValueError, KeyError) as error:
            _unwrap(model)
            remedy = "Check its target modules against the base model's"
            raise AdapterError([Problem("lora", f"does not fit the base model ({error})", remedy)]) from error
    return wrapped


def _trainer(
    wrapped: PeftModel,
    examples: list[dict[str, list[int]]],
    settings: FinetuneSettings,
    plan: _Plan,
    work_dir: Path,
    progress: Progress | None,
    soft: SoftLabels | None,
    after_epoch: Callable[[int], bool],
) -> Any:
    """A ``transformers.Trainer`` that reports to nobody, prints nothing and stops at the first bad loss."""
    import torch
    from peft import PeftType
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    chosen = wrapped.active_peft_config
    # one that was migrated has its ranks, and a schedule of one step
    adaptive = chosen.peft_type == PeftType.ADALORA and chosen.total_step > 1

    class Callbacks(TrainerCallback):  # type: ignore[misc]
        """Progress after each step; the mark of completeness after each checkpoint."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if progress is not None and logs and "loss" in logs:
                progress(state.global_step, state.max_steps, float(logs["loss"]))

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if after_epoch(round(state.epoch)):
                control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _mark_complete(work_dir / f"checkpoint-{state.global_step}")

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if adaptive:  # moves rank between modules; the Trainer counts the step only afterwards
                wrapped.base_model.update_and_allocate(state.global_step + 1)

    from lorasuite.distillation import KNOWN, LOG_PROBS, OUTCOMES, distilled_loss

    class Quiet(Trainer):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if soft is None:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            taught = {name: inputs.pop(name) for name in (OUTCOMES, LOG_PROBS, KNOWN)}
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
            summed = distilled_loss(
                outputs.logits, labels, taught, soft.vocabulary, soft.temperature, settings.distillation
            )
            return (summed / count, outputs) if return_outputs else summed / count

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
            # The Trainer would replace a NaN in its log by an average and train on.
            if not torch.isfinite(loss):
                raise NumericalError(
                    [
                        Problem(
                            f"fine-tuning step {self.state.global_step + 1}",
                            f"the loss is {float(loss)}",
                            f"Lower the learning rate (now {settings.learning_rate:g})",
                        )
                    ]
                )
            return loss

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            # PEFT's default looks for the base on the Hub at every checkpoint.
            wrapped.save_pretrained(str(output_dir), safe_serialization=True, save_embedding_layers=False)

    saving = "steps" if settings.checkpoint_steps else "epoch"
    if adaptive:
        saving = "no"  # the importance of each direction so far is in no checkpoint: such a run begins again
    warmup: float = settings.warmup_steps or settings.warmup_ratio
    checkpointing: dict[str, Any] = {}
    if settings.gradient_checkpointing:
        kind = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
        # Re-entrant checkpointing needs inputs that require gradients; a frozen base's embeddings do not.
        checkpointing = {f"{kind}_checkpointing": True, f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        output_dir=str(work_dir),
        use_cpu=plan.device.type == "cpu",
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=plan.bf16,
        optim="adamw_torch",
        **checkpointing,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy=saving,
        save_steps=settings.checkpoint_steps or 500,
        save_total_limit=2,  # the newest is not yet marked complete when the Trainer removes old ones
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=plan.device.type == "cuda",
        dataloader_num_workers=0,
    )
    _ = arguments.device  # sets _n_gpu
    if plan.device.type == "cuda":
        arguments._n_gpu = 1  # several visible GPUs would otherwise mean nn.DataParallel

    def collated(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return collate(batch) if soft is None else collate(batch) | soft.batch(batch)

    trainer = Quiet(
        model=wrapped, args=arguments, train_dataset=examples, data_collator=collated, callbacks=[Callbacks()]
    )
    trainer.remove_callback(PrinterCallback)  # prints each log to standard output
    if not trainer.model_accepts_loss_kwargs:
        # Such a model averages over its micro-batch; summing here keeps accumulation equal to the full batch.
        def token_mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
            return _summed_loss(outputs.logits, labels) / num_items_in_batch

        trainer.compute_loss_func = token_mean
    return trainer


# ------------------------------------------------------------------------------------------------------ checkpoints


def _prepare_work_dir(
    work_dir: Path,
    settings: FinetuneSettings,
    examples: list[dict[str, list[int]]],
    wrapped: PeftModel,
    soft: SoftLabels | None,
    stop: int | None,
) -> Path | None:
    """Claim ``work_dir`` for this run; its last complete checkpoint, or None to start from the beginning."""
    run = {"key": _run_key(settings, examples, wrapped), "soft_labels": soft.digest() if soft else None, "stop": stop}
    record = work_dir / _RUN
    try:
        same = json.loads(record.read_text(encoding="utf-8")) == run
    except (OSError, ValueError):
        same = False
    if not same:
        for stale in work_dir.glob("checkpoint-*"):
            shutil.rmtree(stale)
        work_dir.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(run), encoding="utf-8")
        return None
    complete: dict[int, Path] = {}
    for checkpoint in work_dir.glob("checkpoint-*"):
        if _is_complete(checkpoint):
            complete[int(checkpoint.name.rpartition("-")[2])] = checkpoint
        else:
            logger.warning("%s was being written when its run was interrupted; it is not used", checkpoint.name)
            shutil.rmtree(checkpoint)
    if not complete:
        return None
    step = max(complete)
    logger.info("fine-tuning goes on from step %d", step)
    return complete[step]


def _clear_work_dir(work_dir: Path) -> None:
    """Remove what this module put into a work directory, and the directory where nothing else is in it."""
    for checkpoint in work_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    (work_dir / _RUN).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        work_dir.rmdir()


def _run_key(settings: FinetuneSettings, examples: list[dict[str, list[int]]], wrapped: PeftModel) -> str:
    """Hash of what decides the result: settings, examples, starting adapter, the base's shape, library versions."""
    import peft
    import torch
    import transformers

    digest = hashlib.sha256()
    # How often checkpoints are kept changes nothing in the result.
    digest.update(settings.model_dump_json(exclude={"checkpoint_steps"}).encode())
    digest.update(json.dumps(examples).encode())
    digest.update(f"{torch.__version__} {transformers.__version__} {peft.__version__}".encode())
    for name, parameter in sorted(wrapped.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.requires_grad:
            digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
        else:
            # A sample of each frozen tensor tells bases apart without reading gigabytes.
            digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _mark_complete(checkpoint: Path) -> None:
    """Put every file of a checkpoint on disk, then the mark with their sizes."""
    sizes = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != _COMPLETE):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        sizes[str(file.relative_to(checkpoint))] = file.stat().st_size
    partial = checkpoint / f"{_COMPLETE}.partial"
    with partial.open("w", encoding="utf-8") as handle:
        json.dump(sizes, handle)
        handle.flush()
        os.fsync(handle.fileno())
    partial.rename(checkpoint / _COMPLETE)


def _is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint carries its mark and every file has the size it was marked with."""
    try:
        sizes = json.loads((checkpoint / _COMPLETE).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on the GPU since the run began, or resident in this process since it started."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
