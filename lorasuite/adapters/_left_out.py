"""What lies in an adapter's file and changes nothing: copies of the base's embeddings, and modules never trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorasuite.adapters._base_modules import vocabulary_side, vocabulary_weight
from lorasuite.bases import Checkpoint
from lorasuite.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from lorasuite.adapters._reader import Adapter

#: Rows of an embedding that are compared at a time.
CHUNK = 8192
NEVER_TRAINED = "never trained: the update is zero (and outside the language model's blocks)"
DORA_OF_PARAMETERS = "PEFT adapts it as a parameter, which it cannot with DoRA: the old base runs without it, too"


@dataclass
class LeftOut:
    """What is left out of an adapter: ``(module, why)`` each, and what looks like it and is not."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)

    def leave(self, module: str, why: str) -> None:
        """Leave out a module as a whole."""
        self.rows.append((module, why))
        self.whole.append(module)

    @property
    def modules(self) -> set[str]:
        """The modules that are left out as a whole."""
        return set(self.whole)


@lru_cache(maxsize=32)
def left_out(adapter: Adapter, base: Checkpoint) -> LeftOut:
    """What of an adapter changes nothing in its base.

    Updates outside the language model's blocks are read, and embeddings that the config does not name as trained are
    compared with the base's.

    Raises:
        AdapterError: if one holds NaN or Inf.
        CheckpointError: if the base's embedding cannot be read.
    """
    found = LeftOut()
    known = base.architecture
    for path, update in adapter.contents.updates.items():
        expert = known.locate_expert(path) is not None
        outside = not expert and known.locate(path) is None and vocabulary_side(known, path) is None
        if outside and update.stored and not all(bool(factor.any()) for factor in update.read(None)):
            found.leave(path, NEVER_TRAINED)
        elif outside and not known.adapted(path):
            found.leave(path, f"{known.refusal(path)}: the old base runs without it, too")
        elif adapter.contents.magnitudes and (expert or (outside and known.as_parameter(path))):
            found.leave(path, DORA_OF_PARAMETERS)
    found.rows += [
        (path, "the frozen copy of a module that was trained as a whole") for path in adapter.contents.frozen
    ]
    for path, name in adapter.contents.copies.items():
        if vocabulary_side(base.architecture, path) is None:
            found.problems.append(_no_factor(adapter, name))
        else:
            _compare(found, adapter, base, path, name)
    return found


def _no_factor(adapter: Adapter, name: str) -> Problem:
    what = f"holds {name.removeprefix('base_model.model.')}, which is no LoRA factor"
    return Problem(str(adapter.tensors.file), what, "Only LoRA updates of linear modules and embeddings are migrated.")


def _compare(found: LeftOut, adapter: Adapter, base: Checkpoint, path: str, name: str) -> None:
    """Whether an embedding's rows are the base's, as they are where a trainer has only changed how many there are."""
    try:
        weight = vocabulary_weight(base, path)
        rows, width = base.shape(weight)
    except CheckpointError as error:
        found.problems += error.problems
        return
    shape, where = adapter.tensors.shapes[name], str(adapter.tensors.file)
    wrong_base = "The adapter was trained on another base: give that one as --old-base."
    if len(shape) != 2 or shape[1] != width:
        what = f"{path} is {shape}, the old base has {(rows, width)}"
        found.problems.append(Problem(where, what, wrong_base))
        return
    shared = min(rows, shape[0])
    other = sum(_others(adapter.tensors.raw(name), base, weight, shared))
    if other:
        what = f"{path} differs from the old base's in {other} of {shared} rows, and the config does not name it"
        remedy = (
            f"If it was trained, name it in modules_to_save of {adapter.path / 'adapter_config.json'}. {wrong_base}"
        )
        found.problems.append(Problem(where, what, remedy))
        return
    found.rows.append((path, f"a copy of the old base's embedding: all of its {shared} rows are the base's"))
    if shape[0] > rows:
        why = f"{shape[0] - rows} rows for tokens that the adapter added, which have no counterpart in the new base"
        found.rows.append((path, why))


def _others(stored: Tensor, base: Checkpoint, weight: str, rows: int) -> Iterator[int]:
    """Rows that are not the base's, a chunk at a time: equal are those that rounding to any half precision makes so."""
    for ids in torch.arange(rows).split(CHUNK):
        mine, theirs = stored[ids].float(), base.tensor(weight, ids)
        same = torch.zeros(len(ids), dtype=torch.bool)
        for dtype in {stored.dtype, torch.bfloat16, torch.float16}:
            same |= (theirs.to(dtype).float() == mine).all(1)
        yield int((~same).sum())
