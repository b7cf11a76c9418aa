"""Adapters put on a loaded model, taken off again so that the base stays what it was, and saved."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasuite.adapters._config_patterns import pattern_problems
from lorasuite.adapters._config_types import type_problems
from lorasuite.adapters._files import CONFIG
from lorasuite.adapters._kinds import changes_base
from lorasuite.bases import Checkpoint, read_config_json
from lorasuite.errors import AdapterError, OutputError, Problem

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


@contextlib.contextmanager
def without_old_names() -> Iterator[None]:
    """For calls of PEFT: without the warnings that transformers since 5.2x gives of its own methods' former names, by
    which PEFT calls them. Nobody but PEFT can mend that."""
    with warnings.catch_warnings():
        former = "`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated"
        warnings.filterwarnings("ignore", former, FutureWarning)
        yield


def attachment_problems(folder: Path, base: Checkpoint) -> list[Problem]:
    """Why PEFT is not to be given an adapter: settings of other types than its own, expressions that take too long.

    Raises:
        CheckpointError: if its config or the base's headers cannot be read.
    """
    config, where = read_config_json(folder / CONFIG), str(folder / CONFIG)
    return type_problems(config, where) or pattern_problems(config, base.shapes(), where)


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
        with without_old_names():
            # PEFT looks for the keys among modules alone, and applies those of parameters all the same.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
            wrapped = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable, torch_device=str(device))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        unwrap(model)
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
    unwrap(model)
    model.load_state_dict(kept, strict=False)
    return model


@contextlib.contextmanager
def attached(model: PreTrainedModel, adapter: Path, device: str | torch.device = "cpu") -> Iterator[PeftModel]:
    """The model with an adapter, unmerged and in evaluation mode, while the context lasts.

    Raises:
        AdapterError: as :func:`attach_adapter`.
    """
    wrapped = attach_adapter(model, adapter, device=device)
    try:
        yield wrapped.eval()
    finally:
        detach_adapter(wrapped)


def _changes_weights(adapter: Path) -> bool:
    """Whether PEFT changes the base's weights when it loads the adapter, as PiSSA's initialisation does."""
    from lorasuite.bases import read_json

    return changes_base(read_json(adapter / "adapter_config.json"))


def unwrap(model: PreTrainedModel) -> None:
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
    """Give a model back as it was: its modules, which parameters are trained, its mode and its cache setting.

    Args:
        checkpointing: switch gradient checkpointing off afterwards.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training, use_cache = model.training, getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        unwrap(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(name, parameter.requires_grad))
            parameter.grad = None
        if checkpointing:
            # Named activation checkpointing since transformers 5.2x, gradient checkpointing before.
            getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
            model.disable_input_require_grads()  # a hook on the embeddings, which checkpointing needs
        if use_cache is not None:
            model.config.use_cache = use_cache
        model.train(training)


def save_files(wrapped: PeftModel, folder: Path, **settings: Any) -> None:
    """Write a PEFT adapter's safetensors and config into ``folder``, as ``save_pretrained`` does with ``settings``.

    PEFT's template ``README.md`` is left out: its placeholders would pass for a model card, and compiling it takes
    longer than writing a small adapter.
    """
    wrapped.create_or_update_model_card = lambda _folder: None
    try:
        # "auto" would look the base up on the Hub; nothing here ever resizes embeddings.
        wrapped.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False, **settings)
    finally:
        del wrapped.create_or_update_model_card


def save_adapter(wrapped: PeftModel, output: Path, *, initial: Path | None = None) -> None:
    """Write a PEFT adapter (safetensors and config) so that ``output`` never exists half-written.

    Args:
        initial: the same adapter saved before training, where its start took factors out of the base (PiSSA and its
            like): written is the difference, a plain LoRA of twice the rank for the base as it was.

    Raises:
        OutputError: ``output`` exists.
    """
    output = Path(output)
    if output.exists():
        raise OutputError([Problem(str(output), "exists already", "Choose another directory, or remove it")])
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        difference = {} if initial is None else {"path_initial_model_for_weight_conversion": str(initial)}
        save_files(wrapped, partial, **difference)
        partial.chmod(0o755)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
