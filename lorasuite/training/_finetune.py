"""The light fine-tune of the paper (LoRASuite, arXiv 2505.13515): a few steps on a migrated adapter, or a new LoRA.

The training loop is ``transformers.Trainer``; this adds what a pipeline stage needs around it: checkpoints that are
only trusted when complete, the same result after an interruption, a loss curve, and errors where nothing would be
trained. Importing this module does not load transformers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorasuite.adapters import attach_adapter, restored, save_adapter, without_old_names
from lorasuite.bases import loaded_model, placed
from lorasuite.data import Row, RowEncoder
from lorasuite.errors import AdapterError, ConfigError, NumericalError, OutputError, Problem
from lorasuite.progress import TrainingProgress
from lorasuite.training._checkpoints import claim_work_dir, clear_work_dir
from lorasuite.training._device import base_dtype, peak_memory, plan_device
from lorasuite.training._loss import validation_loss
from lorasuite.training._on_policy import PLACE, StepRows
from lorasuite.training._passes import Fitting
from lorasuite.training._rehearsal import thinned
from lorasuite.training._settings import FinetuneResult, FinetuneSettings, Loss, Validation
from lorasuite.training._starts import starting, wrap_fresh

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorasuite.training._distillation import SoftLabels
    from lorasuite.training._weights import TokenWeights


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
    pause_at: int | None = None,
    start_loss: float | None = None,
    token_weights: TokenWeights | None = None,
    on_policy: StepRows | None = None,
    fitting: Fitting | None = None,
    encoder: RowEncoder | None = None,
    rehearsal: Sequence[Row] = (),
) -> FinetuneResult:
    """Fine-tune an existing adapter (``adapter``) or a freshly initialised one (``lora``).

    Called again with the same arguments after an interruption, the run goes on from its last complete checkpoint and
    ends in the same tensors (bit for bit on the CPU) as an undisturbed one; checkpoints of any other run found in
    ``work_dir`` are removed. The base's weights never change.

    The same seed, inputs and machine give the same tensors on the CPU. The loss is normalised by the label tokens of
    the whole batch, so how it is divided into forward passes changes it by rounding only; that is decided by the rows'
    lengths and the memory (:mod:`lorasuite.training._passes`).

    A step costs a forward and backward pass through the frozen base of the tokens there are and little padding, and
    the head at label positions (:mod:`lorasuite.training._head`). At 8B in bf16 with rank 16 on every projection,
    512 label tokens of 2,048: 16 GB of weights, 0.5 GB of adapter, gradients and optimizer, and by rows what
    activations they take.

    Args:
        base: a model, which is moved to ``device`` and otherwise given back as it came, or a directory, loaded through
            the cache of models of this process.
        tokenizer: the base's.
        rows: to train on.
        settings: of the run.
        adapter: PEFT directory to start from.
        lora: of a new adapter; give one of the two.
        output: where the tuned PEFT adapter is written; it appears only once it is whole.
        work_dir: of the checkpoints of a run in progress.
        device: ``cpu`` or ``cuda``.
        validation_rows: their loss is taken before the first step and after every epoch.
        progress: called after each optimizer step.
        trust_remote_code: whether code of the base's own may run.
        soft_labels: with ``settings.distillation`` the loss of the rows they know is :func:`distilled_losses`;
            ``validation_loss`` never is.
        stop_after: ends the run after so many epochs, on the schedule of the whole run; 0 writes the start itself.
        pause_at: leaves the run after so many optimizer steps of it, without ``output``: called again with the same
            arguments but this one, it goes on from there. ``validation_loss`` is then that at the pause, and
            ``validation`` has the epochs of this call.
        start_loss: what ``validation_rows`` lose before the first step, where that is known: it is not computed again.
        token_weights: how much each label counts, where they do not count alike; not in ``validation_loss``.
        on_policy: writes and judges each step's rows anew, in place of ``rows``, of which only the prompts count then;
            the loss is :func:`distilled_losses` of what the student wrote, with weight 1 and reversed.
        fitting: what is known to fit into the memory, so that it is not measured again, and what this run finds.
        encoder: of the tokenizer and the settings' cut-off, which knows rows of other runs already.
        rehearsal: texts of the bare base's own, which are read beside the rows (:mod:`lorasuite.training._rehearsal`);
            not with ``on_policy``.

    Raises:
        ConfigError: not exactly one of ``adapter`` and ``lora``, or a device or precision that is not there.
        OutputError: ``output`` exists.
        DataError: no usable rows.
        AdapterError: the adapter does not fit the base, or leaves nothing to train.
        CheckpointError: the base cannot be loaded.
        NumericalError: a loss is NaN or infinite; names the step.
    """
    from transformers import set_seed

    from lorasuite.training._trainer import build_trainer

    plan = plan_device(settings, device)
    if (adapter is None) == (lora is None):
        raise ConfigError(
            [Problem("finetune", "needs exactly one of adapter and lora", "Give a starting point or a LoraConfig")]
        )
    output, work_dir = Path(output), Path(work_dir)
    if output.exists():
        raise OutputError([Problem(str(output), "exists already", "Choose another directory, or remove it")])
    encode = RowEncoder(tokenizer, settings.cutoff) if encoder is None else encoder
    encoded, validated = encode(rows), encode(validation_rows) if validation_rows else None
    if not settings.distillation:
        soft_labels = None
    texts = thinned(encode(rehearsal).examples) if rehearsal else []
    examples = [*encoded.examples, *texts]
    if on_policy is not None:
        settings = settings.model_copy(update={"distillation": 1.0})
        away = set(encoded.cut_off)
        places = (n for n in range(len(rows)) if n not in away)
        examples = [{**example, PLACE: [n]} for n, example in zip(places, examples, strict=True)]
    taught = {"soft_labels": soft_labels, "token_weights": token_weights, "on_policy": on_policy}

    with contextlib.ExitStack() as stack:
        if isinstance(base, str):
            dtype = base_dtype(settings, plan.device)
            kept = loaded_model(base, plan.device, dtype=dtype, trust_remote_code=trust_remote_code)
            model = stack.enter_context(kept)
        else:
            model = placed(base, plan.device)
        if plan.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(plan.device)
        initial = stack.enter_context(starting(model, lora, settings.init))
        stack.enter_context(restored(model, checkpointing=settings.gradient_checkpointing is not False))
        # Seeded here too: a fresh LoRA's A is drawn before the Trainer seeds.
        set_seed(settings.seed)
        _prepare(model, settings.gradient_checkpointing is True)
        if adapter is not None:
            wrapped = attach_adapter(model, Path(adapter), device=plan.device, trainable=True)
        else:
            wrapped = wrap_fresh(model, lora, settings.init, encoded.examples)
            if initial is not None:
                save_adapter(wrapped, initial)
        trainable = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
        if not trainable:
            raise AdapterError(
                [Problem(str(adapter or "lora"), "leaves no parameter to train", "Check its target modules")]
            )
        checkpoint = claim_work_dir(work_dir, settings, examples, wrapped, taught, stop_after)
        started = time.perf_counter()
        curve: list[Validation] = []
        micro = settings.micro_batch_size
        validation_batch = settings.batch_size if micro == "auto" else micro

        def held_out() -> float | None:
            if validated is None:
                return None
            return validation_loss(wrapped, tokenizer, validated, settings.cutoff, validation_batch)

        def validate(epoch: int) -> None:
            loss = held_out() if epoch or start_loss is None else start_loss
            if loss is not None:
                curve.append(Validation(epoch=epoch, loss=loss))

        def after_epoch(epoch: int) -> bool:
            validate(epoch)
            return stop_after is not None and epoch >= stop_after

        if checkpoint is None:
            validate(0)

        trainer = build_trainer(
            wrapped, examples, settings, plan, work_dir, progress, soft_labels, after_epoch, pause_at, token_weights,
            on_policy, fitting,
        )  # fmt: skip
        done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        paused = pause_at is not None
        if checkpoint is not None and pause_at is not None and done >= pause_at:
            _read_checkpoint(wrapped, checkpoint)
        elif stop_after != 0:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        steps = max(int(trainer.state.global_step), done)
        reached = curve[-1]["loss"] if curve else None
        if paused and not (curve and curve[-1]["epoch"] == trainer.state.epoch):
            reached = held_out()
        seconds = time.perf_counter() - started
        losses = [
            Loss(step=entry["step"], loss=entry["loss"], learning_rate=entry["learning_rate"])
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        # The last step's gradient can be bad after a good loss, and no later loss would tell.
        bad = [name for name, value in wrapped.named_parameters() if value.requires_grad and not value.isfinite().all()]
        if bad:
            remedy = f"Lower the learning rate (now {settings.learning_rate:g})"
            raise NumericalError([Problem(f"fine-tuning step {steps}", f"left {bad[0]} not finite", remedy)])
        result = FinetuneResult(
            steps=steps,
            learning_rate=settings.learning_rate,
            losses=losses,
            validation_loss=reached,
            validation=curve,
            seconds=seconds,
            peak_memory_bytes=peak_memory(plan.device),
            samples=len(encoded.examples),
            rehearsed=len(texts),
            dropped=len(encoded.cut_off),
            distilled=sum(e["input_ids"] in soft_labels for e in encoded.examples) if soft_labels else 0,
            trainable_parameters=trainable,
            precision="bf16" if plan.bf16 or model.dtype == torch.bfloat16 else "fp32",
            micro_batch_size=trainer.fitting.rows,
            resumed_from=done if checkpoint else None,
        )
        if paused:
            return result
        save_adapter(wrapped, output, initial=initial)
    # Only now: until the output is in place the last checkpoint is the run's only trace.
    clear_work_dir(work_dir)
    return result


def _read_checkpoint(wrapped: PeftModel, checkpoint: Path) -> None:
    """Give the adapter the weights of a checkpoint."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(wrapped, load_peft_weights(str(checkpoint), device="cpu"))


def _prepare(model: PreTrainedModel, checkpointing: bool) -> None:
    """Norms and embeddings of a quantized base in float32, as QLoRA has them (arXiv 2305.14314)."""
    from peft import prepare_model_for_kbit_training

    if getattr(model, "is_quantized", False):
        with without_old_names():
            prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
