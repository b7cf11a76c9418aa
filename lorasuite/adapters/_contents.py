"""What an adapter holds, whatever its kind: factored updates by module, and what lies beside them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lorasuite.bases import Checkpoint
from lorasuite.errors import AdapterError, CheckpointError, Problem

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."


class Tensors:
    """An adapter's tensors: safetensors, or a pickle file read with ``weights_only=True``.

    Raises:
        CheckpointError: if the file cannot be read.
    """

    def __init__(self, file: Path) -> None:
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
        """Tensor name → shape."""
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


@dataclass(frozen=True, eq=False)
class Update:
    """Where one module's update comes from.

    ``read`` gives the factors ``B (out, r)``, ``A (r, in)`` before scaling, from the old base where it needs that;
    ``shape`` is ``(out, in)``, None where only the old base knows it; ``stored`` tells factors that lie in the file
    from those that take a computation.
    """

    rank: int
    scaling: float
    shape: tuple[int, int] | None
    read: Callable[[Checkpoint | None], tuple[Tensor, Tensor]]
    stored: bool = True


#: Reads from the old base what was added to a module's bias ``(out,)`` float64; None where it has none, or keeps it.
BiasChange = Callable[[Checkpoint], Tensor | None]


@dataclass(frozen=True, eq=False)
class Contents:
    """What an adapter holds, by module path of the base model: updates, changes of biases, names of other tensors.

    ``tokens``: embedding path → its tensor, and the ids its rows stand for.
    """

    updates: dict[str, Update] = field(default_factory=dict)
    magnitudes: dict[str, str] = field(default_factory=dict)
    biases: dict[str, BiasChange] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)


Read = tuple[Contents, list[Problem]]


def initial_adapter(folder: Path) -> Path | None:
    """The adapter as it was before training, kept in ``*_init`` inside the adapter's directory."""
    return next((path.parent for path in sorted(folder.glob(f"*_init/{WEIGHTS}"))), None)


def base_weight(base: Checkpoint | None, module: str) -> Tensor:
    """A module's weight in the old base, ``(out, in)`` float32.

    Raises:
        AdapterError: if no base is given, or it has no such module.
    """
    located = None if base is None else base.architecture.locate(module)
    if base is None or located is None:
        raise AdapterError(
            Problem(module, "its update depends on the old base's weight, which is not there", "Give the old base.")
        )
    return base.weight(*located)


def base_bias(base: Checkpoint, module: str) -> Tensor | None:
    """A module's bias ``(out,)`` in the old base, if it has one."""
    name = f"{module}.bias"
    return base.tensor(name) if base.find(name) is not None else None
