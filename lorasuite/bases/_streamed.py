"""A base for :class:`LayerStream`, however it can be read: layer by layer, or loaded whole."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lorasuite.bases._cache import model_cache
from lorasuite.bases._checkpoint import Checkpoint
from lorasuite.bases._loading import load_tokenizer
from lorasuite.bases._streaming import StreamedBase
from lorasuite.bases._tracing import LoadedBase
from lorasuite.errors import CheckpointError

logger = logging.getLogger(__name__)


def unstreamed(checkpoint: Checkpoint, trust_remote_code: bool = False) -> str | None:
    """Why :func:`streamed_base` loads a base whole (see :meth:`StreamedBase.open`); None where it does not.

    The model is built without weights, which takes up to a second.
    """
    try:
        StreamedBase.open(checkpoint, None, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        return error.problems[0].what
    return None


@contextlib.contextmanager
def streamed_base(
    source: str | Path,
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
) -> Iterator[LoadedBase]:
    """A base for :class:`LayerStream`: one that the process has loaded already, else one read layer by layer.

    A checkpoint whose blocks cannot be filled tensor by tensor (:func:`unstreamed`) is loaded whole, which is logged.

    Args:
        source: a local directory or ``hub-id[/subfolder][@revision]``.
        dtype: None means the checkpoint's own; on a CPU float32, unless it has instructions for bfloat16 files.
        tokenizer: None loads the model's own.

    Raises:
        CheckpointError: if it cannot be read.
    """
    checkpoint = Checkpoint(source)
    tokenizer = load_tokenizer(source, trust_remote_code) if tokenizer is None else tokenizer
    if not model_cache.holds(source, device, dtype, trust_remote_code):
        try:
            opened = StreamedBase.open(checkpoint, tokenizer, device, dtype, trust_remote_code)
        except CheckpointError as error:  # the load says what is wrong, where anything is
            logger.warning("%s: %s: it is loaded whole", source, error.problems[0].what)
        else:
            yield opened
            return
    with model_cache.loaded(source, device, dtype=dtype, trust_remote_code=trust_remote_code) as model:
        yield LoadedBase.of(model, tokenizer, checkpoint)
