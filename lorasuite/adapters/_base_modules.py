"""The modules of a base that an adapter may change: weights, biases and shapes, and which of them are embeddings."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lorasuite.bases import Architecture, Checkpoint
from lorasuite.errors import AdapterError, Problem


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


def weight_shape(base: Checkpoint, module: str) -> tuple[int, int]:
    """``(out, in)`` of a block's module, from the header alone.

    Raises:
        AdapterError: if the base has no such module.
    """
    located = base.architecture.locate(module)
    if located is None:
        raise AdapterError(Problem(module, "is not a linear module of the old base", "Give the right --old-base."))
    rows, columns = base.shape(base.architecture.path(*located) + ".weight")
    return (columns, rows) if located[1].transposed else (rows, columns)


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
