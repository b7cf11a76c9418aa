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


#: What wrappers of a model leave in names: torch.compile, FSDP and activation checkpointing.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: The name of an adapter in a state dict that was saved as it is in memory; PEFT's own saving leaves it out.
_NAMED = (
    re.compile(
        r"(\.(?:lora_[ABE]|lora_magnitude_vector|modules_to_save))\.(?!weight$|original_module\b)\w+(?=\.weight$)"
    ),
    re.compile(r"(\.(?:lora_[ABE]|lora_embedding_[AB]|lora_magnitude_vector))\.(?!weight$)\w+$"),
    re.compile(r"()\.default(?=\.|$)"),
)


def peft_name(name: str) -> str:
    """The name PEFT saves a tensor under, of one that was saved otherwise: by a state dict or from inside a wrapper."""
    found = _WRAPPERS.sub("", name)
    for pattern in _NAMED:
        found = pattern.sub(r"\1", found)
    outside = found.startswith("base_model.") and not found.startswith(PREFIX)  # tensors that all modules share
    return found if outside or found.startswith(PREFIX) else PREFIX + found.removeprefix("module.")


class Tensors:
    """An adapter's tensors: safetensors, or a pickle file read with ``weights_only=True``.

    They go by the names that PEFT's ``save_pretrained`` gives them, whatever they are called in the file.
    """

    def __init__(self, file: Path) -> None:
        """The tensors of a file, which is read when they are asked for."""
        self.file = file

    @cached_property
    def stored(self) -> dict[str, str]:
        """Name → the name in the file: another one where it was not PEFT that saved it.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        names = list(self._shapes)
        found = {peft_name(name): name for name in names}
        # of two adapters in one file, which would get the same names, each keeps its own
        return found if len(found) == len(names) else {name: name for name in names}

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
        return {name: self._shapes[stored] for name, stored in self.stored.items()}

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
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

    def raw(self, name: str) -> Tensor:
        """One tensor as it is stored.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        if self.file.suffix == ".bin":
            return self._pickled[self.stored[name]]
        with safe_open(self.file, framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(self.stored[name])
        return tensor

    def tensor(self, name: str) -> Tensor:
        """One tensor in float32 (integers as they are).

        Raises:
            AdapterError: if it holds NaN or Inf.
            CheckpointError: if the file cannot be read.
        """
        tensor = self.raw(name)
        if tensor.is_complex() or (not tensor.is_floating_point() and ".lora_" in name):
            what = f"{name} holds {str(tensor.dtype)[6:]} values"
            problem = Problem(str(self.file), what, "Save it as a float type.")
            raise AdapterError(problem)
        if not tensor.is_floating_point():
            return tensor
        tensor = tensor.float()  # 8-bit floats can be asked for nothing
        if not bool(torch.isfinite(tensor).all()):
            owner = re.sub(r"\.(lora_|base_layer\.|token_adapter\.).*|\.weight$|\.bias$", "", name.removeprefix(PREFIX))
            problem = Problem(str(self.file), f"{owner} holds NaN or Inf", "Training diverged: train it again.")
            raise AdapterError(problem)
        return tensor


def initial_adapter(folder: Path) -> Path | None:
    """The adapter as it was before training, kept in ``*_init`` inside the adapter's directory."""
    return next((path.parent for path in sorted(folder.glob(f"*_init/{WEIGHTS}"))), None)


def elsewhere(folder: Path) -> list[str]:
    """The adapters in subfolders, such as named ones of PEFT and those of a trainer's checkpoints, nearest first."""
    inside = [*sorted(folder.glob(f"*/{CONFIG}")), *sorted(folder.glob(f"*/*/{CONFIG}"))]
    return [path.parent.relative_to(folder).as_posix() for path in inside]
