"""Whole models and tokenizers, as transformers loads them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

from lorasuite.bases._checkpoint import Checkpoint
from lorasuite.bases._files import read_json, resolve
from lorasuite.errors import CheckpointError, Problem

#: transformers and accelerate set global state while they build a model: one at a time in a process.
BUILDING = threading.Lock()


def load_tokenizer(source: str | Path, trust_remote_code: bool = False) -> Any:
    """The model's own tokenizer.

    Raises:
        CheckpointError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    path = resolve(source)
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CheckpointError(
            Problem(
                str(path),
                f"its tokenizer cannot be loaded ({type(error).__name__}: {error})",
                "Save the tokenizer beside the model.",
            )
        ) from error


def auto_class(config: Any) -> Any:
    """The transformers Auto class for a config: the causal one, or the multimodal one where there is no causal one."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return (
        AutoModelForImageTextToText
        if multimodal and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        else AutoModelForCausalLM
    )


def module_order(base: Checkpoint) -> dict[str, int]:
    """Module path → its place in the model that transformers builds (on the meta device: no weight is read).

    Raises:
        CheckpointError: for a model with code of its own, which is not run for this.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(base.path), trust_remote_code=False)  # nor asked about
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
    except (OSError, ValueError) as error:
        what = f"the order of its modules is not known without running its code ({type(error).__name__})"
        raise CheckpointError(Problem(base.source, what, "Train a LoRA adapter.")) from error
    return {name: place for place, (name, _) in enumerate(model.named_modules())}


def empty_model(path: Path, dtype: torch.dtype | None, trust_remote_code: bool = False) -> Any:
    """The model that transformers builds, in evaluation mode: parameters without values (on the meta device), and real
    buffers on the CPU. No weight is read.

    Args:
        dtype: of the parameters; None means the config's own.

    Raises:
        CheckpointError: if it cannot be built.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        code = {"trust_remote_code": True} if trust_remote_code else {}
        named = {} if dtype is None else {"dtype": dtype}
        with BUILDING, init_empty_weights(include_buffers=False):
            model = auto_class(config).from_config(config, **named, **code)
    except (OSError, ValueError) as error:
        remedy = "Give a directory saved with save_pretrained; a model with its own code needs trust_remote_code."
        raise CheckpointError(
            Problem(str(path), f"cannot be built ({type(error).__name__}: {error})", remedy)
        ) from error
    return model.eval().requires_grad_(False)


def known_dtype(path: Path, device: torch.device, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype a load gives, so that asking for it by name or by default is one; None where only the load tells."""
    if dtype is not None or device.type == "cpu":
        return dtype or torch.float32
    config = read_json(path / "config.json")
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else None


def load_model(
    source: str | Path, device: str = "cpu", dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> Any:
    """The whole model on a device, in evaluation mode, with frozen weights.

    It is loaded anew: :func:`lorasuite.bases.loaded_model` keeps what it has loaded.

    Args:
        source: a local directory or ``hub-id[@revision]``.
        dtype: None means float32 on the CPU and the checkpoint's own elsewhere.

    Raises:
        CheckpointError: if it cannot be loaded.
    """
    from transformers import AutoConfig

    path = resolve(source)
    wanted = dtype or (torch.float32 if torch.device(device).type == "cpu" else "auto")
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        loader = auto_class(config)
        model = loader.from_pretrained(str(path), dtype=wanted, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            Problem(
                str(path),
                f"cannot be loaded ({type(error).__name__}: {error})",
                "Check that the directory was saved with save_pretrained; a model with its own code needs "
                "trust_remote_code.",
            )
        ) from error
    return model.to(device).eval().requires_grad_(False)
