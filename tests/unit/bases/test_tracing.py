"""Blocks run alone, on kept states: what the whole model computes, in every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorasuite.bases import (
    ActivationRecorder,
    BlockStream,
    Checkpoint,
    LoadedBase,
    load_model,
    load_tokenizer,
    put_weights,
)
from tests import models


@pytest.mark.parametrize("family", models.FAMILIES)
def test_block_by_block_as_in_one_pass(family: str, tmp_path: Path) -> None:
    base = models.build(tmp_path / "base", family, seed=3)
    model = load_model(base, "cpu", trust_remote_code=models.needs_code(base))
    side = LoadedBase.of(model, load_tokenizer(base, models.needs_code(base)), Checkpoint(base))
    g = torch.Generator().manual_seed(0)
    texts = [torch.randint(4, 90, (2, length), generator=g) for length in (5, 9)]
    layers = side.dims.layers
    recorder = ActivationRecorder(side)
    for layer in range(layers):
        recorder.block(layer)
    rows = torch.tensor([0, 1, 1]), torch.tensor([4, 0, 3])
    with recorder:
        wanted = [recorder.read(ids, rows) for ids in texts]
        stream = BlockStream(side, texts)
        for layer in range(layers):
            assert stream.layer == layer
            for number, expected in enumerate(wanted):
                seen = stream.read(recorder, number, rows)
                for end in ("in", "out"):
                    torch.testing.assert_close(seen[layer, "block", end], expected[layer, "block", end])
            stream.advance()


def test_states_go_on_from_weights_as_they_are(tmp_path: Path) -> None:
    """Weights changed in a block are in what it gives behind it, and not in what it was given."""
    base = models.build(tmp_path / "base", "llama", seed=3)
    side = LoadedBase.of(load_model(base, "cpu"), load_tokenizer(base), Checkpoint(base))
    ids = torch.arange(4, 14)[None]
    stream = BlockStream(side, [ids])
    before = stream.run(0)
    path = "model.layers.0.mlp.down_proj"
    kept = {path: side.model.get_submodule(path).weight.detach().clone()}
    put_weights(side, {path: 2 * kept[path]})
    stream.advance(again=True)
    recorder = ActivationRecorder(side)
    recorder.block(1)
    with recorder:
        seen = recorder.read(ids, (torch.zeros(10, dtype=torch.long), torch.arange(10)))
    torch.testing.assert_close(stream.states[0][0].double(), seen[1, "block", "in"])
    assert not torch.allclose(before, stream.states[0])
