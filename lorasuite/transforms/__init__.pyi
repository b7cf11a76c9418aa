from ._embeddings import move_embeddings
from ._magnitudes import bias_changes, move_rows, new_magnitudes, own_biases, relative_magnitudes
from ._migration import Migrated, Unmapped, initialise, migrate
from ._protocol import NO_START, LayerPair, names, reads_texts, register, transform

__all__ = [
    "NO_START",
    "LayerPair",
    "Migrated",
    "Unmapped",
    "bias_changes",
    "initialise",
    "migrate",
    "move_embeddings",
    "move_rows",
    "names",
    "new_magnitudes",
    "own_biases",
    "reads_texts",
    "register",
    "relative_magnitudes",
    "transform",
]
