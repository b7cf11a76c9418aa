"""What a transform is: its two kinds, what each is given and gives back, and what it declares about itself.

Nothing outside a transform's own module knows its name: flows, stages and settings read these declarations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from lorasuite.adapters import LowRank
from lorasuite.bases import Dimensions, LoadedBase, Role
from lorasuite.correspondence import End, MapKind, SpaceMap, StateMap, TransferMatrix
from lorasuite.errors import ConfigError, Problem
from lorasuite.progress import Progress


class Input(StrEnum):
    """An artifact of the pair of bases that a transform reads: the name of the stage that computes it."""

    LAYER_MAPPING = "layer_mapping"
    HEAD_MAPPING = "head_mapping"
    TRANSFER_MATRICES = "transfer_matrices"
    MLP_FACTORS = "mlp_factors"
    ALIGNMENT = "alignment"
    STATE_MAP = "state_map"


#: What moving an adapter layer by layer reads whatever the transform: the layer map, and for magnitudes, biases and
#: embeddings (which no transform sees) the head maps and ``W_h``.
LAYER_INPUTS = frozenset({Input.LAYER_MAPPING, Input.HEAD_MAPPING, Input.TRANSFER_MATRICES})


@dataclass(frozen=True, eq=False)
class LayerPair:
    """One old layer, the new layer that continues it, and all a layer transform may look at.

    ``old`` and ``new`` hold the base weights ``(out, in)`` of the roles that :meth:`LayerTransform.weights` asked for,
    float32 unless it takes those of 16 bits as they are; ``heads`` maps old to new query heads; ``mlp_factors`` holds
    :func:`lorasuite.correspondence.mlp_factor` of the old layer, where the transform declares
    :attr:`Input.MLP_FACTORS`; ``alignment`` gives maps, where it declares :attr:`Input.ALIGNMENT`.
    """

    old: Mapping[Role, Float[Tensor, "_ _"]]
    new: Mapping[Role, Float[Tensor, "_ _"]]
    old_dims: Dimensions
    new_dims: Dimensions
    heads: Mapping[int, int]
    transfer: TransferMatrix
    mlp_factors: Mapping[Role, Float[Tensor, "_ _"]] = field(default_factory=dict)
    alignment: Callable[[Role, End, MapKind], SpaceMap] | None = None

    def map(self, role: Role, end: End, kind: MapKind) -> SpaceMap:
        """The map of what the role's projection reads (``"in"``) or writes (``"out"``), old to new.

        Raises:
            ConfigError: if no activations were aligned, or the transform does not declare the kind.
        """
        if self.alignment is None:
            raise ConfigError(
                Problem("method", "it needs activations of calibration texts", "Give --calibration texts.")
            )
        return self.alignment(role, end, kind)


@dataclass(frozen=True)
class FittedUpdates:
    """What a model transform gives back.

    ``updates``: by module path of the new base, factors of at most the rank asked for, float64. ``residual``: for each,
    the share of its target's sum of squares that the fit left, in 0 … 1. ``map_error``: by block path, the share of
    the variance of the new base's states that the state map does not explain; empty for a transform without one.
    """

    updates: dict[str, LowRank] = field(default_factory=dict)
    residual: dict[str, float] = field(default_factory=dict)
    map_error: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class Transform(Protocol):
    """What every transform declares; derive from :class:`LayerTransform` or :class:`ModelTransform`.

    One with rules for certain roles alone also has ``roles``, which ones (:func:`can_move`).
    """

    #: What ``--method`` calls it.
    name: str
    #: The artifacts of the pair that it reads.
    inputs: frozenset[Input]
    #: Whether ``auto`` tries it where a fine-tune follows: whether it was measured to be a start worth having.
    starts_finetune: bool = True
    #: Whether it needs texts: calibration texts that both bases read.
    reads_texts: bool = False
    #: Whether it is a control, there to be beaten: used only if named, never proposed and never chosen by ``auto``.
    control: bool = False

    def problems(self, old: Dimensions, new: Dimensions, updated: Sequence[Role]) -> list[Problem]:
        """Why it cannot move updates of the roles ``updated`` between bases of these dimensions; empty if it can."""
        return []


def can_move(chosen: Transform, role: Role) -> bool:
    """Whether a transform has a rule for a role: for any, unless it declares ``roles``."""
    known: Collection[Role] | None = getattr(chosen, "roles", None)
    return known is None or role in known


def takes_stored(chosen: Transform) -> bool:
    """Whether a transform takes base weights that are stored in 16 bits as they are, and not in float32."""
    return bool(getattr(chosen, "as_stored", False))


@runtime_checkable
class LayerTransform(Transform, Protocol):
    """A training-free map of one layer's updates from the old base to the new one.

    One that takes base weights of 16 bits as they are, and multiplies them by
    :func:`lorasuite.correspondence.times`, also has ``as_stored = True`` (:func:`takes_stored`).
    """

    #: Whether every row of an update stays at its own place, so that magnitudes and biases do, too, and do not go with
    #: the mapped heads.
    keeps_places: bool = False

    def weights(self, updated: Sequence[Role]) -> Sequence[Role]:
        """The roles whose base weights it looks at to move updates of the roles ``updated``."""
        return ()

    def move(self, pair: LayerPair, updates: Mapping[Role, LowRank]) -> dict[Role, LowRank]:
        """The new layer's updates by role, factored, float64: each ``(out, in)`` of the new role's weight.

        Args:
            updates: the old layer's, ``(out, in)`` of the old weights, float64. A role that the new layer lacks may be
                among them; what is given back for it is dropped.
        """


@runtime_checkable
class AlignedTransform(LayerTransform, Protocol):
    """A layer transform that looks at activations: it declares :attr:`Input.ALIGNMENT`, and which maps it reads."""

    #: The kinds of map of what projections read and of what they write. A kind of its own is a function of the sums
    #: over one space's rows (:class:`lorasuite.correspondence.MapKind`), evaluated once a pair while the sums are at
    #: hand: no transform sees sums or rows.
    maps: Mapping[End, MapKind]


@runtime_checkable
class ModelTransform(Transform, Protocol):
    """A closed-form fit of whole models: it moves updates of block projections, and nothing that lies beside them."""

    def fit(
        self,
        old: LoadedBase,
        new: LoadedBase,
        adapted: Callable[[], contextlib.AbstractContextManager[Any]],
        roles: Sequence[Role],
        *,
        states: StateMap | None,
        texts: Sequence[str],
        rank: int,
        cutoff: int = 256,
        progress: Progress | None = None,
    ) -> FittedUpdates:
        """Updates with which the new base does on the texts what the old base does with its adapter.

        The weights of both models are the same afterwards as before.

        Args:
            adapted: a context in which ``old.model`` computes with its adapter.
            roles: projections that the old adapter updates.
            states: the pair's state map, which has these roles; None unless :attr:`Input.STATE_MAP` is declared.
            texts: task texts (prompts with answers), read but never used as labels.
            rank: of each module's update.
            cutoff: tokens of a text read at most, in each model.

        Raises:
            DataError: if no two positions of the two tokenizations pair.
        """
