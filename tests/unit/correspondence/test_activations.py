"""Pooled hidden states against one unpadded example at a time through transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasuite.bases import Checkpoint, LoadedBase, load_model, main_stream, streamed_base
from lorasuite.correspondence import Pooling, hidden_states
from lorasuite.errors import DataError
from tests import models

TEXTS = [
    "w1 w2 w3", "w5", "w9 w8 w7 w6 w5 w4 w3 w2 w1", "w70 w12", "w11 w11 w11 w11", "w40 w41 w42 w43 w44 w45", "w3 w1",
]  # fmt: skip


def states(path: Path, texts: list[str] = TEXTS, **settings: Any) -> torch.Tensor:
    """Those of the base read layer by layer, where it can be."""
    with streamed_base(path, trust_remote_code=models.needs_code(path), tokenizer=models.tokenizer_of(path)) as base:
        return hidden_states(base, texts, **settings)


def one_at_a_time(path: Path, pooling: str, cutoff: int = 256) -> torch.Tensor:
    """``(L − 1, N, d)``: transformers puts the final norm on the last entry of ``hidden_states``."""
    model, tokenizer = models.load(path), models.tokenizer_of(path)
    found = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"][:cutoff]])
        with torch.no_grad():
            layers = map(main_stream, model(ids, output_hidden_states=True).hidden_states[1:-1])
        found.append(torch.stack([h[0].mean(0) if pooling == "mean" else h[0, -1] for h in layers]))
    return torch.stack(found, 1)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_they_are_the_models_own_states(family: str, pooling: Pooling, base: Callable[..., Path]) -> None:
    path = base(family)
    ours = states(path, batch_size=3, pooling=pooling)
    assert ours.shape == (3, len(TEXTS), 32) and ours.dtype == torch.float32
    torch.testing.assert_close(ours[:-1], one_at_a_time(path, pooling), rtol=1e-4, atol=1e-5)
    assert float((ours[0] - ours[1]).abs().max()) > 0.01


def test_the_last_layer_is_the_block_before_the_final_norm(base: Callable[..., Path]) -> None:
    path = base("llama")
    model = models.load(path)
    ours = states(path, pooling="last")[-1]
    for row, text in zip(ours, TEXTS, strict=True):
        ids = torch.tensor([models.tokenizer_of(path)(text)["input_ids"]])
        with torch.no_grad():
            normed = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
            torch.testing.assert_close(model.model.norm(row), normed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_the_batch_size_does_not_matter(family: str, base: Callable[..., Path]) -> None:
    whole = states(base(family), batch_size=16)
    for size in (1, 2, 5):
        torch.testing.assert_close(states(base(family), batch_size=size), whole, rtol=1e-5, atol=1e-5)


def test_the_cutoff_cuts_tokens(base: Callable[..., Path]) -> None:
    path = base("llama")
    cut = states(path, batch_size=4, cutoff=3)
    torch.testing.assert_close(cut[:-1], one_at_a_time(path, "mean", cutoff=3), rtol=1e-4, atol=1e-5)
    assert float((cut - states(path)).abs().max()) > 0.01


def test_a_tokenizer_without_padding_token_gives_the_same(base: Callable[..., Path]) -> None:
    path = base("llama")
    tokenizer = models.tokenizer_of(path)
    tokenizer.pad_token = None
    ours = hidden_states(LoadedBase.of(load_model(path), tokenizer, Checkpoint(path)), TEXTS)
    torch.testing.assert_close(ours, states(path), rtol=1e-5, atol=1e-5)


def test_hooks_are_removed_and_progress_is_told(base: Callable[..., Path]) -> None:
    path, seen = base("llama"), []
    model = load_model(path)
    hidden_states(
        LoadedBase.of(model, models.tokenizer_of(path), Checkpoint(path)), TEXTS, batch_size=3,
        progress=lambda done, of: seen.append((done, of)),
    )  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert not any(block._forward_hooks for block in model.model.layers)


def test_texts_that_cannot_be_read(base: Callable[..., Path]) -> None:
    path = base("llama")
    with pytest.raises(DataError, match="no texts"):
        states(path, [])
    with pytest.raises(DataError) as caught:
        states(path, ["w1", "", "w2", "  "])
    assert [p.where for p in caught.value.problems] == ["calibration text 1", "calibration text 3"]
    assert not caught.value.problems[0].what.startswith("holds")
