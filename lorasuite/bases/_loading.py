"""Whole models and tokenizers, as transformers loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lorasuite.bases._checkpoint import Checkpoint
from lorasuite.bases._files import resolve
from lorasuite.errors import CheckpointError, Problem


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
