"""The training loop: ``transformers.Trainer``, silent, with soft labels, and stopped at the first bad loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lorasuite.data import IGNORED
from lorasuite.errors import NumericalError, Problem
from lorasuite.progress import TrainingProgress
from lorasuite.training._checkpoints import mark_complete
from lorasuite.training._device import DevicePlan
from lorasuite.training._distillation import KNOWN, LOG_PROBS, OUTCOMES, SoftLabels, distilled_loss
from lorasuite.training._loss import collate, summed_loss
from lorasuite.training._settings import FinetuneSettings

if TYPE_CHECKING:
    from peft import PeftModel


def build_trainer(
    wrapped: PeftModel,
    examples: list[dict[str, list[int]]],
    settings: FinetuneSettings,
    plan: DevicePlan,
    work_dir: Path,
    progress: TrainingProgress | None,
    soft_labels: SoftLabels | None,
    after_epoch: Callable[[int], bool],
    pause_at: int | None = None,
) -> AdapterTrainer:
    """A trainer of an adapter that reports to nobody and prints nothing.

    Args:
        wrapped: the model with its trainable adapter.
        examples: encoded rows.
        settings: of the run.
        plan: of the device.
        work_dir: where checkpoints are written.
        progress: called after each optimizer step.
        soft_labels: the teacher's distributions, where the run distils.
        after_epoch: called with the epochs done; True ends the run.
        pause_at: optimizer step after which a checkpoint is written and the run left.
    """
    from peft import PeftType

    config = wrapped.active_peft_config
    # An AdaLoRA that was migrated has its ranks, and a schedule of one step.
    adaptive = config.peft_type == PeftType.ADALORA and config.total_step > 1

    def collated(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return collate(batch) if soft_labels is None else collate(batch) | soft_labels.batch(batch)

    trainer = AdapterTrainer(
        model=wrapped,
        args=_arguments(settings, plan, work_dir, resumable=not adaptive),
        train_dataset=examples,
        data_collator=collated,
        callbacks=[RunCallback(work_dir, progress, after_epoch, wrapped if adaptive else None, pause_at)],
        soft_labels=soft_labels,
        distillation=settings.distillation,
    )
    trainer.remove_callback(PrinterCallback)  # prints each log to standard output
    if not trainer.model_accepts_loss_kwargs:
        # Such a model averages over its micro-batch; summing here keeps accumulation equal to the full batch.
        def token_mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
            return summed_loss(outputs.logits, labels) / num_items_in_batch

        trainer.compute_loss_func = token_mean
    return trainer


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """The loss is distilled where there are soft labels, and must be finite; checkpoints hold the adapter alone."""

    def __init__(self, *, soft_labels: SoftLabels | None, distillation: float, **arguments: Any) -> None:
        self._soft_labels, self._distillation = soft_labels, distillation
        super().__init__(**arguments)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the batch's label tokens of :func:`distilled_loss`, or without soft labels the model's own."""
        soft = self._soft_labels
        if soft is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        taught = {name: inputs.pop(name) for name in (OUTCOMES, LOG_PROBS, KNOWN)}
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        summed = distilled_loss(outputs.logits, labels, taught, soft.vocabulary, soft.temperature, self._distillation)
        return (summed / count, outputs) if return_outputs else summed / count

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass.

        Raises:
            NumericalError: the loss is NaN or infinite. The Trainer would log an average in its place and train on.
        """
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            where = f"fine-tuning step {self.state.global_step + 1}"
            remedy = f"Lower the learning rate (now {self.args.learning_rate:g})"
            raise NumericalError([Problem(where, f"the loss is {float(loss)}", remedy)])
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter as it is; PEFT's default looks for the base on the Hub at every checkpoint."""
        self.model.save_pretrained(str(output_dir), safe_serialization=True, save_embedding_layers=False)


class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Progress after each step, the end after an epoch, marks of complete checkpoints, and AdaLoRA's ranks."""

    def __init__(
        self,
        work_dir: Path,
        progress: TrainingProgress | None,
        after_epoch: Callable[[int], bool],
        adaptive: PeftModel | None,
        pause_at: int | None,
    ) -> None:
        self._work_dir, self._progress, self._after_epoch = work_dir, progress, after_epoch
        self._adaptive, self._pause_at = adaptive, pause_at

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Report a step."""
        if self._progress is not None and logs and "loss" in logs:
            self._progress(state.global_step, state.max_steps, float(logs["loss"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the run, with a checkpoint to go on from, where it is to pause here."""
        if self._pauses(state):
            control.should_save = args.save_strategy != "no"
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run where it is to end here; a pause within an epoch comes here, too."""
        if self._pauses(state):
            control.should_save = False  # done after the step
            if state.epoch != round(state.epoch):
                return
        if self._after_epoch(round(state.epoch)):
            control.should_training_stop = True

    def _pauses(self, state: Any) -> bool:
        return self._pause_at is not None and state.global_step >= self._pause_at

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark a checkpoint as complete."""
        mark_complete(self._work_dir / f"checkpoint-{state.global_step}")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move rank between the modules of an AdaLoRA; the Trainer counts the step only afterwards."""
        if self._adaptive is not None:
            self._adaptive.base_model.update_and_allocate(state.global_step + 1)


def _arguments(settings: FinetuneSettings, plan: DevicePlan, work_dir: Path, *, resumable: bool) -> TrainingArguments:
    """The settings in the Trainer's terms.

    Args:
        resumable: False for an AdaLoRA in training: the importance of each direction so far is in no checkpoint, so
            such a run begins again.
    """
    saving = "steps" if settings.checkpoint_steps else "epoch"
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
        save_strategy=saving if resumable else "no",
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
    return arguments
