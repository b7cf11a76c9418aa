"""The training loop: ``transformers.Trainer``, quiet, with soft labels, and stopped at the first bad loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasuite.adapters import attach_adapter, unwrap
from lorasuite.data import IGNORED
from lorasuite.errors import AdapterError, ConfigError, NumericalError, Problem
from lorasuite.progress import TrainingProgress
from lorasuite.training._loss import _summed_loss, collate
from lorasuite.training._resume import _mark_complete
from lorasuite.training._settings import FinetuneSettings

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from lorasuite.training._distillation import SoftLabels


def _wrap(model: PreTrainedModel, adapter: Path | None, lora: LoraConfig | None, plan: _Plan) -> PeftModel:
    """The model with its trainable adapter, the base frozen."""
    from peft import get_peft_model

    if adapter is not None:
        wrapped = attach_adapter(model, Path(adapter), device=plan.device, trainable=True)
    else:
        try:
            wrapped = get_peft_model(model, lora)
        except (ValueError, KeyError) as error:
            unwrap(model)
            remedy = "Check its target modules against the base model's"
            raise AdapterError([Problem("lora", f"does not fit the base model ({error})", remedy)]) from error
    return wrapped


def _trainer(
    wrapped: PeftModel,
    examples: list[dict[str, list[int]]],
    settings: FinetuneSettings,
    plan: _Plan,
    work_dir: Path,
    progress: TrainingProgress | None,
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
        """TrainingProgress after each step; the mark of completeness after each checkpoint."""

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

    from lorasuite.training._distillation import KNOWN, LOG_PROBS, OUTCOMES, distilled_loss

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


@dataclass(frozen=True)
class _Plan:
    """What the settings mean on this device."""

    device: torch.device
    bf16: bool
    micro_batch: int
    accumulation: int


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
