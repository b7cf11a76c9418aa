"""The two bases of a stage: read from their files, or loaded whole and kept for the next stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from lorasuite.adapters import own_tokenizer
from lorasuite.bases import (
    Checkpoint,
    LoadedBase,
    LoadSettings,
    load_tokenizer,
    loaded_model,
    streamed_base,
)
from tasks.stage import Where

BASES = ("old_base", "new_base")
#: The path of a directory with an adapter's own tokenizer, where it is used in place of the base's.
OWN_TOKENIZER = "own_tokenizer"


def trusted(where: Where) -> bool:
    """Whether model repositories may run their own code."""
    return bool(where.options.get("trust_remote_code"))


def checkpoints(where: Where) -> tuple[Checkpoint, Checkpoint]:
    """The weights of both bases, opened lazily."""
    return Checkpoint(where.path("old_base")), Checkpoint(where.path("new_base"))


def tokenizer(where: Where, base: str, own: bool = False) -> Any:
    """The tokenizer of the base at a path of that name.

    Args:
        own: or rather the adapter's own, where its path is given; the stage's key says so too.
    """
    found = load_tokenizer(where.path(base), trusted(where))
    if own and OWN_TOKENIZER in where.paths:
        adapters = own_tokenizer(where.path(OWN_TOKENIZER), found, trusted(where))
        return found if adapters is None else adapters.tokenizer
    return found


def tokenizers(where: Where) -> tuple[Any, Any]:
    """Both bases' tokenizers."""
    return tokenizer(where, "old_base"), tokenizer(where, "new_base")


def loading(where: Where) -> LoadSettings:
    """How bases that are run are loaded."""
    return LoadSettings.model_validate(where.options.get("loading", {}))


@contextmanager
def running(
    where: Where, base: str, dtype: torch.dtype | None = None, own_tokenizer: bool = False
) -> Iterator[LoadedBase]:
    """The base at a path of that name, loaded as the settings say, for the stages whose keys say so too.

    Args:
        dtype: where the settings name none.
        own_tokenizer: with the adapter's own tokenizer, where its path is given.
    """
    settings = loading(where)
    wanted = dtype if settings.dtype == "auto" and not settings.quantized else None
    with loaded_model(
        where.path(base), where.device, dtype=wanted, trust_remote_code=trusted(where), loading=settings
    ) as model:
        yield LoadedBase.of(model, tokenizer(where, base, own_tokenizer), Checkpoint(where.path(base)))


@contextmanager
def loaded(where: Where, base: str) -> Iterator[LoadedBase]:
    """The base at a path of that name whatever the settings of loading say, in the dtype that a base has where none is
    named; loaded once in a process as long as memory lasts."""
    with loaded_model(where.path(base), where.device, trust_remote_code=trusted(where)) as model:
        yield LoadedBase.of(model, tokenizer(where, base), Checkpoint(where.path(base)))


def streamed(where: Where, base: str) -> AbstractContextManager[LoadedBase]:
    """The base at a path of that name, for :class:`lorasuite.bases.LayerStream`: read layer by layer, unless it is
    loaded already."""
    return streamed_base(where.path(base), where.device, trust_remote_code=trusted(where))
