"""The embeddings among the modules an adapter may change."""

from __future__ import annotations

from typing import Literal

from lorasuite.bases import (
    Architecture,
    Checkpoint,
)


def vocabulary_side(architecture: Architecture, path: str) -> Literal["input", "output"] | None:
    """Which embedding a module path is, if it is one."""
    if path in architecture.names(architecture.embedding):
        return "input"
    return "output" if path in architecture.names(architecture.unembedding) else None


def vocabulary_weight(checkpoint: Checkpoint, path: str) -> str:
    """The name of an embedding's tensor: a tied output embedding is the input one."""
    names = [path + ".weight"]
    if vocabulary_side(checkpoint.architecture, path) == "output":
        names.append(checkpoint.architecture.unembedding + ".weight")
    names.append(checkpoint.architecture.embedding + ".weight")
    return next((found for name in names if (found := checkpoint.find(name)) is not None), names[0])


def vocabulary_shape(checkpoint: Checkpoint, path: str) -> tuple[int, int]:
    """``(V, d)`` of an embedding."""
    rows, columns = checkpoint.shape(vocabulary_weight(checkpoint, path))
    return rows, columns
