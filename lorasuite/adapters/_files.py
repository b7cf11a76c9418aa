"""The files of a PEFT adapter directory, and the tensors in them."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lorasuite.errors import AdapterError, CheckpointError, Problem

#: Names of the files: factors, factors in a pickle file, and settings.
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
CONFIG = "adapter_config.json"
#: What PEFT puts before the module paths of the base model in the names of tensors.
PREFIX = "base_model.model."


class Tensors:
    """An adapter's tensors: safetensors, or a pickle file read with ``weights_only=True``."""

    def __init__(self, file: Path) -> None:
        """The tensors of a file, which is read when they are asked for."""
        self.file = file

    @cached_property
    def _pickled(self) -> dict[str, Tensor]:
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
                raise TypeError("it holds something other than tensors")
        except Exception as error:  # the unpickler raises many kinds, and advises to switch its guard off
            what = f"is damaged, or holds something other than tensors ({type(error).__name__})"
            raise CheckpointError(Problem(str(self.file), what, "Save it again as safetensors.")) from None
        return state

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name → shape.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        if self.file.suffix == ".bin":
            return {name: tuple(tensor.shape) for name, tensor in self._pickled.items()}
        try:
            with safe_open(self.file, framework="pt") as handle:
                return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        except Exception as error:
            problem = Problem(
                str(self.file), f"is not a readable safetensors file ({error})", "Save or download it again."
            )
            raise CheckpointError(problem) from error

    def tensor(self, name: str) -> Tensor:
        """One tensor in float32 (integers as they are).

        Raises:
            AdapterError: if it holds NaN or Inf.
            CheckpointError: if the file cannot be read.
        """
        if self.file.suffix == ".bin":
            tensor = self._pickled[name]
        else:
            with safe_open(self.file, framework="pt") as handle:
                tensor = handle.get_tensor(name)
        if not tensor.is_floating_point():
            return tensor
        if not bool(torch.isfinite(tensor).all()):
            owner = re.sub(r"\.(lora_|base_layer\.|token_adapter\.).*|\.weight$|\.bias$", "", name.removeprefix(PREFIX))
            problem = Problem(str(self.file), f"{owner} holds NaN or Inf", "Training diverged: train it again.")
            raise AdapterError(problem)
        return tensor.float()


def initial_adapter(folder: Path) -> Path | None:
    """The adapter as it was before training, kept in ``*_init`` inside the adapter's directory."""
    return next((path.parent for path in sorted(folder.glob(f"*_init/{WEIGHTS}"))), None)


def elsewhere(folder: Path) -> str:
    """The adapters in subfolders, such as named ones of PEFT and those of a trainer's checkpoints, for a message."""
    found = [f"{path.parent.relative_to(folder)}/" for path in sorted(folder.glob(f"*/{CONFIG}"))]
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
