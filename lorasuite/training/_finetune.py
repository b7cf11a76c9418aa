"""Lightweight fine-tuning (LFT): a few steps on a migrated adapter, or a fresh LoRA as the control.

Defaults are LoRASuite's (arXiv 2505.13515): AdamW, linear decay without warm-up, learning rate 1e-3, batches of 16,
3 epochs, 256 tokens. The training loop is ``transformers.Trainer``; this module adds what a pipeline stage needs around
it: checkpoints that are only trusted when complete, the same result after an interruption, a loss curve, and errors
instead of silent no-ops.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorasuite.adapters import restored, save_adapter
from lorasuite.data import Row, encode_rows
from lorasuite.errors import AdapterError, ConfigError, NumericalError, OutputError, Problem
from lorasuite.progress import TrainingProgress
from lorasuite.training._loss import validation_loss
from lorasuite.training._resume import _clear_work_dir, _prepare_work_dir
from lorasuite.training._settings import FinetuneResult, FinetuneSettings, Loss, Validation
from lorasuite.training._trainer import _plan, _trainer, _wrap

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorasuite.training._distillation import SoftLabels


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
    progress: TrainingProgress | None = None,
    trust_remote_code: bool = False,
    soft_labels: SoftLabels | None = None,
    stop_after: int | None = None,
) -> FinetuneResult:
    """Fine-tune an existing adapter (``adapter``) or a freshly initialised one (``lora``: the scratch control).

    The tuned PEFT adapter is written to ``output``, which appears only once it is whole. ``work_dir`` holds the
    checkpoints of a run in progress: called again with the same arguments after an interruption, the run goes on from
    its last complete checkpoint and ends in the same tensors (bit for bit on the CPU) as an undisturbed one;
    checkpoints of any other run found there are removed. The base's weights never change. A ``base`` given by its
    directory is loaded through the process's cache of models; a model passed as ``base`` is moved to ``device`` and
    otherwise given back as it came. With ``soft_labels`` and ``settings.distillation`` the
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

    from lorasuite.bases import loaded_model

    plan = _plan(settings, device)
    if (adapter is None) == (lora is None):
        raise ConfigError(
            [Problem("finetune", "needs exactly one of adapter and lora", "Give a starting point or a LoraConfig")]
        )
    output, work_dir = Path(output), Path(work_dir)
    if output.exists():
        raise OutputError([Problem(str(output), "exists already", "Choose another directory, or remove it")])
    encoded = encode_rows(rows, tokenizer, settings.cutoff)

    with contextlib.ExitStack() as stack:
        if isinstance(base, str):
            dtype = torch.bfloat16 if plan.bf16 else torch.float32
            kept = loaded_model(base, plan.device, dtype=dtype, trust_remote_code=trust_remote_code)
            model = stack.enter_context(kept)
        else:
            model = base.to(plan.device)
        if plan.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(plan.device)
        stack.enter_context(restored(model, checkpointing=settings.gradient_checkpointing))
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
