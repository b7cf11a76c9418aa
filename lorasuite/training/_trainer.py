"""The training loop: ``transformers.Trainer``, silent, its steps made of forward passes that fit, its loss checked."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lorasuite.adapters import save_files
from lorasuite.data import IGNORED
from lorasuite.errors import NumericalError, Problem
from lorasuite.progress import TrainingProgress
from lorasuite.training._checkpoints import mark_complete
from lorasuite.training._device import DevicePlan
from lorasuite.training._distillation import (
    KNOWN,
    LOG_PROBS,
    OUTCOMES,
    UNIT_LOG_PROBS,
    UNITS,
    SoftLabels,
    distilled_losses,
    label_terms,
)
from lorasuite.training._head import LabelHead, cross_entropies, label_rows
from lorasuite.training._loss import collate
from lorasuite.training._on_policy import PLACE, StepRows
from lorasuite.training._passes import PASS_TOKENS, Fitting, activation_bytes, free_memory, passes, rows_that_fit
from lorasuite.training._settings import FinetuneSettings
from lorasuite.training._weights import WEIGHTS, TokenWeights

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

#: Names of a batch's soft labels, in the order that the loss takes them.
SOFT = (OUTCOMES, LOG_PROBS, KNOWN, UNITS, UNIT_LOG_PROBS)


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
    token_weights: TokenWeights | None = None,
    on_policy: StepRows | None = None,
    fitting: Fitting | None = None,
) -> AdapterTrainer:
    """A trainer of an adapter that prints nothing.

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
        token_weights: how much each label counts, where they do not count alike.
        on_policy: what writes and judges the rows of each step, in place of the examples.
        fitting: what is known to fit into the memory; what this run finds is written into it.
    """
    from peft import PeftType

    config = wrapped.active_peft_config
    # An AdaLoRA that was migrated has its ranks, and a schedule of one step.
    adaptive = config.peft_type == PeftType.ADALORA and config.total_step > 1

    trainer = AdapterTrainer(
        model=wrapped,
        args=_arguments(settings, plan, work_dir, resumable=not adaptive),
        train_dataset=examples,
        data_collator=list,  # a step's rows; they are divided into forward passes before they are padded
        callbacks=[RunCallback(work_dir, progress, after_epoch, wrapped if adaptive else None, pause_at)],
        settings=settings,
        soft_labels=soft_labels,
        token_weights=token_weights,
        on_policy=on_policy,
        fitting=Fitting() if fitting is None else fitting,
    )
    trainer.remove_callback(PrinterCallback)  # prints each log to standard output
    return trainer


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """Steps made of forward passes that fit; the head at label positions; a loss that must be finite.

    Checkpoints hold the adapter alone.

    Attributes:
        fitting: what was found to fit into the memory.
    """

    #: A step's passes are normalised by the step's label tokens.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        settings: FinetuneSettings,
        soft_labels: SoftLabels | None,
        token_weights: TokenWeights | None,
        on_policy: StepRows | None,
        fitting: Fitting,
        **arguments: Any,
    ) -> None:
        self._settings, self._soft_labels = settings, soft_labels
        self._token_weights, self._on_policy = token_weights, on_policy
        self.fitting = fitting
        super().__init__(**arguments)
        if fitting.checkpointing or settings.gradient_checkpointing is True:
            self._checkpoint_activations()
        config = self.model.active_peft_config
        # What such a model adds to its own loss (AdaLoRA keeps its directions orthogonal, routers are balanced) is not
        # in its logits: it takes that loss from the model, with all its logits.
        text = self.model.config.get_text_config()
        self._models_own = (soft_labels, token_weights, on_policy) == (None, None, None) and (
            config.peft_type == "ADALORA" or bool(getattr(text, "output_router_logits", False))
        )
        self._head = LabelHead(self.model)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The loss of some of a step's rows, over ``num_items_in_batch`` label tokens: a share of the step's mean.

        With soft labels it is :func:`distilled_losses`; token weights multiply whatever it is.
        """
        if self._models_own:
            count = (inputs["labels"][:, 1:] != IGNORED).sum()
            return model(**inputs).loss * (count / num_items_in_batch)  # type: ignore[no-any-return]
        labels, soft = inputs.pop("labels"), self._soft_labels
        weights, *taught = (inputs.pop(name, None) for name in (WEIGHTS, *SOFT))
        at, positions, targets = label_rows(labels)
        with self.accelerator.autocast():
            states = self._head.states(inputs)
            rows = states[at.to(states.device), positions.to(states.device)]
            if soft is None:
                losses = self._head.map(rows, cross_entropies, targets)
            else:
                told = [part[at, positions] for part in taught]
                options: dict[str, Any] = {"temperature": soft.temperature, "reverse": self._on_policy is not None}
                terms = functools.partial(label_terms, vocabulary=soft.vocabulary, **options)
                found = self._head.map(rows, terms, targets, *told[:3])
                here = [part.to(found.device) for part in (told[2], at, *told[3:])]
                losses = distilled_losses(found, *here, weight=self._settings.distillation, **options)
            if weights is not None:
                losses = losses * weights[at, positions].to(losses.device)
            return losses.sum() / num_items_in_batch  # type: ignore[no-any-return]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The forward and backward passes of a step, fewer rows in each where memory runs out.

        Args:
            model: the adapted model.
            inputs: the step's encoded rows.
            num_items_in_batch: not used; a step's label tokens are counted here.

        Raises:
            NumericalError: the loss is NaN or infinite. The Trainer would log an average in its place and train on.
        """
        if self._on_policy is not None:
            places = [row[PLACE][0] for row in inputs]
            inputs, self._soft_labels = self._on_policy(self.model, places, self.state.global_step)
            if not inputs:
                return torch.zeros((), device=self.args.device)
        lengths = [len(row["input_ids"]) for row in inputs]
        count = sum(label != IGNORED for row in inputs for label in row["labels"][1:])
        while True:
            try:
                most = self._rows_that_fit()
                parts = passes(lengths, most, PASS_TOKENS[self.args.device.type])
                loss = torch.stack([self._pass(model, [inputs[n] for n in part], count) for part in parts]).sum()
                break
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or not self._take_less():
                    raise
            model.zero_grad()  # what the passes before it left
            clear_device_cache(garbage_collection=True)
        if not torch.isfinite(loss):
            where = f"fine-tuning step {self.state.global_step + 1}"
            remedy = f"Lower the learning rate (now {self.args.learning_rate:g})"
            raise NumericalError([Problem(where, f"the loss is {float(loss)}", remedy)])
        return loss

    def _pass(self, model: Any, rows: list[dict[str, list[int]]], count: int) -> torch.Tensor:
        """One forward and backward pass; the rows' share of the step's loss, without gradient."""
        batch = collate(rows)
        for known in (self._soft_labels, self._token_weights):
            batch |= {} if known is None else known.batch(rows)
        loss: torch.Tensor = super().training_step(model, batch, torch.tensor(count, device=self.args.device))
        return loss

    def _rows_that_fit(self) -> int:
        """Most rows of a forward pass, before the first step by what the longest row takes of the free memory."""
        if self.fitting.rows is not None:
            return self.fitting.rows
        wanted, device = self._settings.micro_batch_size, self.args.device
        if wanted != "auto" and self._settings.gradient_checkpointing != "auto":
            self.fitting.rows = wanted
            return wanted
        longest = max(self.train_dataset, key=lambda row: len(row["input_ids"]))
        batch = self._prepare_inputs(collate([longest]))
        del batch["labels"]
        self.model.train()
        fitting = 0
        for _ in range(2):
            fitting = rows_that_fit(activation_bytes(self._head, batch), free_memory(device))
            if fitting or self.fitting.checkpointing or self._settings.gradient_checkpointing is False:
                break
            logger.info(
                "a row's activations do not fit into the free memory: they are recomputed in each backward pass"
            )
            self._checkpoint_activations()
        most = self._settings.batch_size if wanted == "auto" else wanted
        while wanted == "auto" and most > max(fitting, 1):
            most = math.ceil(most / 2)
        self.fitting.rows = most
        return most

    def _take_less(self) -> bool:
        """Halve the rows of a pass after memory ran out, and of one row recompute the activations; False: no less."""
        rows = self.fitting.rows
        if rows is not None and rows > 1 and self._settings.micro_batch_size == "auto":
            self.fitting.rows = math.ceil(rows / 2)
            logger.info("out of memory: at most %d rows in a forward pass", self.fitting.rows)
            return True
        if self._settings.gradient_checkpointing == "auto" and not self.fitting.checkpointing:
            self._checkpoint_activations()
            logger.info("out of memory: activations are recomputed in each backward pass")
            return True
        return False

    def _checkpoint_activations(self) -> None:
        """Keep only each block's input for the backward pass."""
        base = self.model.get_base_model()
        # Re-entrant checkpointing needs inputs that require gradients; a frozen base's embeddings do not.
        getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)({"use_reentrant": False})
        self.fitting.checkpointing = True

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW; with ``loraplus_lr_ratio`` LoRA+'s, whose learning rate of B is a multiple of that of A."""
        ratio = self._settings.loraplus_lr_ratio
        if ratio is not None:
            from peft.optimizers import create_loraplus_optimizer

            kind, named = self.get_optimizer_cls_and_kwargs(self.args)
            decay = self.args.weight_decay
            self.optimizer: Any = create_loraplus_optimizer(
                self.model, kind, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay, **named
            )
            return self.optimizer
        return super().create_optimizer(model)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: a step's rows are no tensors yet."""
        return 0

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter as it is; PEFT's default looks for the base on the Hub at every checkpoint."""
        save_files(self.model, Path(str(output_dir)))


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
    arguments = TrainingArguments(
        output_dir=str(work_dir),
        use_cpu=plan.device.type == "cpu",
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        num_train_epochs=settings.passes,
        max_steps=settings.max_steps or -1,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=plan.bf16,
        optim="adamw_torch",
        use_liger_kernel=settings.liger,
        liger_kernel_config={"cross_entropy": False, "fused_linear_cross_entropy": False} if settings.liger else None,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy=saving if resumable else "no",
        save_steps=settings.checkpoint_steps or 500,
        save_total_limit=2,  # the newest is not yet marked complete when the Trainer removes old ones
        report_to=settings.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=plan.device.type == "cuda",
        dataloader_num_workers=0,
    )
    _ = arguments.device  # sets _n_gpu
    if plan.device.type == "cuda":
        arguments._n_gpu = 1  # several visible GPUs would otherwise mean nn.DataParallel
    return arguments
