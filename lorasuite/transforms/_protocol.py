"""What a transform is given and what it gives back, and the registry of transforms."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

from torch import Tensor

from lorasuite.adapters import LowRank
from lorasuite.bases import Dimensions, Role
from lorasuite.correspondence import Moments, TransferMatrix
from lorasuite.errors import ConfigError, Problem, did_you_mean


@dataclass(frozen=True, eq=False)
class LayerPair:
    """One old layer, the new layer that continues it, and all a transform may look at.

    ``old`` and ``new`` hold the base weights ``(out, in)`` float32 of the roles that :meth:`Transform.roles` asked
    for; ``heads`` maps old to new query heads; ``mlp_factors`` holds :func:`lorasuite.transfer_matrix.mlp_factor` of
    the old layer.
    """

    old: Mapping[Role, Tensor]
    new: Mapping[Role, Tensor]
    old_dims: Dimensions
    new_dims: Dimensions
    heads: Mapping[int, int]
    transfer: TransferMatrix
    mlp_factors: Mapping[Role, Tensor] = field(default_factory=dict)
    alignment: Callable[[Role, str], Moments] | None = None

    def moments(self, role: Role, end: str) -> Moments:
        """What the role's projection reads (``"in"``) or writes (``"out"``) in both bases.

        Raises:
            ConfigError: if the transform needs activations and none were aligned.
        """
        if self.alignment is None:
            raise ConfigError(
                Problem("method", "it needs activations of calibration texts", "Give --calibration texts.")
            )
        return self.alignment(role, end)


class Transform(Protocol):
    """A training-free map of one layer's updates from the old base to the new one."""

    name: str
    #: Whether it looks at activations of both bases (:mod:`lorasuite.alignment`).
    aligned: bool
    #: Whether it fits whole models at once (:mod:`lorasuite.transforms.sequential`) instead of layer by layer.
    joint: bool
    #: Whether it is there to be beaten (:mod:`lorasuite.transforms.controls`): never proposed, never chosen.
    control: bool

    def fits(self, old: Dimensions, new: Dimensions, updated: tuple[Role, ...]) -> bool:
        """Whether it can move updates of the roles ``updated`` between bases of these dimensions."""

    def roles(self, updated: tuple[Role, ...]) -> tuple[Role, ...]:
        """The roles whose base weights are needed to move updates of the roles ``updated``."""

    def layer(self, pair: LayerPair, updates: Mapping[Role, LowRank]) -> dict[Role, LowRank]:
        """The new layer's updates, factored, float64. A role the new layer lacks may be given and is then dropped."""


#: Transforms that ``auto`` tries only where nothing is fine-tuned: low in loss untrained, not measured as a start.
NO_START = frozenset({"logits"})

_REGISTRY: dict[str, Transform] = {}


@cache
def _load() -> None:
    """Import every transform of this package, which registers it."""
    package = importlib.import_module("lorasuite.transforms")
    for found in pkgutil.iter_modules(package.__path__):
        if not found.name.startswith("_"):
            importlib.import_module(f"lorasuite.transforms.{found.name}")


def register(cls: type[Transform]) -> type[Transform]:
    """Class decorator: make a transform available by its name."""
    _REGISTRY[cls.name] = cls()
    return cls


def transform(name: str) -> Transform:
    """The transform of that name.

    Raises:
        ConfigError: for an unknown name.
    """
    _load()
    if name not in _REGISTRY:
        raise ConfigError(Problem("method", f"unknown method {name!r}", did_you_mean(name, names(controls=True))))
    return _REGISTRY[name]


def reads_texts(name: str) -> bool:
    """Whether the transform of that name looks at what both bases do with calibration texts."""
    chosen = transform(name)
    return chosen.aligned or chosen.joint


def names(controls: bool = False) -> list[str]:
    """Every registered transform; those that are only there to be beaten if asked for."""
    _load()
    return sorted(name for name, found in _REGISTRY.items() if controls or not found.control)
