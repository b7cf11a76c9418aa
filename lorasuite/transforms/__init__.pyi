from ._embeddings import move_embeddings
from ._experts import WRITTEN_ROWS, not_moved
from ._magnitudes import bias_changes, move_rows, new_magnitudes, own_biases, relative_magnitudes
from ._migration import Migrated, initialise, migrate, unmoved
from ._options import Unmapped
from ._protocol import (
    LAYER_INPUTS,
    AlignedTransform,
    FittedUpdates,
    Input,
    LayerPair,
    LayerTransform,
    ModelTransform,
    Transform,
    can_move,
)
from ._registry import AnyTransform, map_kind, names, register, transform

__all__ = [
    "LAYER_INPUTS",
    "WRITTEN_ROWS",
    "AlignedTransform",
    "AnyTransform",
    "FittedUpdates",
    "Input",
    "LayerPair",
    "LayerTransform",
    "Migrated",
    "ModelTransform",
    "Transform",
    "Unmapped",
    "bias_changes",
    "can_move",
    "initialise",
    "map_kind",
    "migrate",
    "move_embeddings",
    "move_rows",
    "names",
    "new_magnitudes",
    "not_moved",
    "own_biases",
    "register",
    "relative_magnitudes",
    "transform",
    "unmoved",
]
