"""Blocks run alone, on kept states: what the whole model computes, in every architecture, loaded or layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasuite.bases import (
    ActivationRecorder,
    Checkpoint,
    LayerStream,
    LoadedBase,
    Place,
    StreamedBase,
    linear_modules,
    load_model,
    load_tokenizer,
    loaded_model,
    main_stream,
    put_weights,
    release_models,
    streamed_base,
    unstreamed,
)
from lorasuite.errors import CheckpointError
from tests import models

#: Families whose experts are tensors of their own in a checkpoint, which transformers stacks when it loads them.
STACKED = (
    "mixtral", "qwen3_moe", "qwen2_moe", "lfm2_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "glm4_moe",
    "glm4_moe_lite", "deepseek_v2", "deepseek_v3", "granitemoehybrid", "ernie4_5_moe", "exaone_moe", "hunyuan_v1_moe",
    "olmoe",
)  # fmt: skip
ROWS = torch.tensor([0, 1, 1]), torch.tensor([4, 0, 3])


def token_ids() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(4, 90, (2, length), generator=g) for length in (5, 9)]


def loaded(path: Path, dtype: torch.dtype | None = None) -> LoadedBase:
    trust = models.needs_code(path)
    return LoadedBase.of(
        load_model(path, "cpu", dtype, trust_remote_code=trust), load_tokenizer(path, trust), Checkpoint(path)
    )


def streamed(path: Path, dtype: torch.dtype | None = None) -> StreamedBase:
    trust = models.needs_code(path)
    return StreamedBase.open(Checkpoint(path), load_tokenizer(path, trust), "cpu", dtype, trust)


def recorder_of(base: LoadedBase) -> ActivationRecorder:
    recorder = ActivationRecorder(base)
    for layer in range(base.dims.layers):
        recorder.block_and_modules(layer)
    return recorder


def whole(base: LoadedBase, texts: list[Tensor]) -> list[dict[Place, Tensor]]:
    with recorder_of(base) as recorder:
        return [recorder.read(ids, ROWS) for ids in texts]


def by_layer(base: LoadedBase, texts: list[Tensor]) -> list[dict[Place, Tensor]]:
    found: list[dict[Place, Tensor]] = [{} for _ in texts]
    with recorder_of(base) as recorder, LayerStream(base, texts) as stream:
        for layer in range(base.dims.layers):
            assert stream.layer == layer
            for number, seen in enumerate(found):
                seen |= stream.read(recorder, number, ROWS)
            stream.advance()
    return found


def same(ours: list[dict[Place, Tensor]], theirs: list[dict[Place, Tensor]], **tolerance: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for place in a:
            torch.testing.assert_close(a[place], b[place], **tolerance)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_layer_by_layer_as_in_one_pass(family: str, tmp_path: Path) -> None:
    path = models.build(tmp_path / "base", family, seed=3, shard="20KB")
    base, texts = loaded(path), token_ids()
    wanted = whole(base, texts)
    same(by_layer(base, texts), wanted)
    if family in STACKED:
        with pytest.raises(CheckpointError, match=r"read layer by layer: .* no tensor that is"):
            streamed(path)
    else:
        same(by_layer(streamed(path), texts), wanted)


def in_memory(base: LoadedBase) -> set[str]:
    """The parameters that have values."""
    return {name for name, parameter in base.model.named_parameters() if not parameter.is_meta}


def test_weights_of_one_block_at_a_time(tmp_path: Path) -> None:
    base = streamed(models.build(tmp_path / "base", "gpt2", seed=3))
    texts = token_ids()
    assert not in_memory(base)
    with LayerStream(base, texts) as stream:
        assert not in_memory(base)  # the embeddings were let go of
        for layer in range(2):
            stream.run(0)
            names = in_memory(base)
            assert names and all(name.startswith(f"transformer.h.{layer}.") for name in names)
            assert len(names) == len(list(base.blocks[layer].parameters()))
            stream.advance()
        stream.run(0)
        assert in_memory(base)
    assert not in_memory(base)


def test_rows_of_the_embedding_that_the_texts_name_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = streamed(models.build(tmp_path / "base", "gemma", seed=3))
    monkeypatch.setattr(torch, "empty", lambda *shape, **named: torch.full(*shape, torch.nan, **named))
    filled = []

    def after(module: Any, _args: Any, _output: Any) -> None:
        filled.append(int((~module.weight.isnan()).all(1).sum()))

    base.model.get_input_embeddings().register_forward_hook(after)
    texts = token_ids()
    states = LayerStream(base, texts).states
    assert filled == 2 * [len(torch.cat([ids.flatten() for ids in texts]).unique())]
    assert all(torch.isfinite(state).all() for state in states)


def test_a_dtype_can_be_chosen(tmp_path: Path) -> None:
    path = models.build(tmp_path / "base", "llama", seed=3, dtype=torch.bfloat16)
    texts = token_ids()
    half = streamed(path, torch.bfloat16)
    with LayerStream(half, texts) as stream:
        assert stream.run(0).dtype == torch.bfloat16 == stream.states[0].dtype
    same(by_layer(half, texts), whole(loaded(path, torch.float32), texts), rtol=0.05, atol=0.3)
    full = streamed(path, torch.float32)
    with LayerStream(full, texts) as stream:
        assert stream.run(0).dtype == torch.float32
    same(by_layer(full, texts), whole(loaded(path, torch.float32), texts))


def test_rows_are_given_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    base = streamed(models.build(tmp_path / "base", "llama", seed=3))
    with recorder_of(base) as recorder, LayerStream(base, token_ids()) as stream:
        found = stream.read(recorder, 1, ROWS, dtype=torch.float32, device=None)
        assert {value.dtype for value in found.values()} == {torch.float32}
        assert found[0, "mlp.down_proj", "in"].shape == (3, 48)


def test_a_loaded_model_is_not_read_again(tmp_path: Path) -> None:
    path = models.build(tmp_path / "base", "llama", seed=3)
    release_models()
    with streamed_base(path) as base:
        assert isinstance(base, StreamedBase)
    with loaded_model(path) as model, streamed_base(path) as base:
        assert isinstance(base, StreamedBase)  # the model is lent
    with streamed_base(path) as base:
        assert base.model is model
        LayerStream(base, token_ids())
        assert "forward" not in vars(base.blocks[0])
    release_models()


def test_what_cannot_be_streamed_is_loaded_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = models.build(tmp_path / "base", "mixtral", seed=3)
    why = unstreamed(Checkpoint(path))
    assert why is not None and "cannot be read layer by layer: the checkpoint has no tensor that is" in why
    assert unstreamed(Checkpoint(models.build(tmp_path / "dense", "llama", seed=3))) is None
    with streamed_base(path) as base:
        assert type(base) is LoadedBase
        assert [record.getMessage() for record in caplog.records] == [f"{path}: {why}: it is loaded whole"]
        same(by_layer(base, token_ids()), whole(base, token_ids()))
    release_models()


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_states_go_on_from_weights_as_they_are(layer_by_layer: bool, tmp_path: Path) -> None:
    """Weights changed in a block are in what it gives behind it, and not in what it was given."""
    path = models.build(tmp_path / "base", "llama", seed=3)
    changed = loaded(path)
    base = streamed(path) if layer_by_layer else loaded(path)
    ids, name = torch.arange(4, 14)[None], "model.layers.0.mlp.down_proj"
    stream = LayerStream(base, [ids])
    before = stream.run(0)
    for one in (changed, base):
        put_weights(one, {name: 2 * one.model.get_submodule(name).weight})
    stream.advance(again=True)
    rows = torch.zeros(10, dtype=torch.long), torch.arange(10)
    with ActivationRecorder(changed).block(1) as recorder:
        seen = recorder.read(ids, rows)
    torch.testing.assert_close(stream.states[0][0].double(), seen[1, "block", "in"])
    assert not torch.allclose(before, stream.states[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3_text", "mixtral"])
def test_a_pass_ends_behind_what_is_wanted(family: str, tmp_path: Path) -> None:
    base = loaded(models.build(tmp_path / "base", family, seed=3, shard="20KB"))
    texts = token_ids()
    wanted = whole(base, texts)
    names = list(linear_modules(base, 0))
    run: list[str] = []
    for name, (_, linear) in linear_modules(base, 0).items():
        linear.register_forward_hook(lambda *_, name=name: run.append(name))
    for places in ([(0, names[0], "in")], [(0, names[-1], "out"), (0, "block", "in")], [(0, "block", "out")]):
        with LayerStream(base, texts) as stream, ActivationRecorder(base).only(places) as recorder:
            for number, expected in enumerate(wanted):
                run.clear()
                seen = stream.read(recorder, number, ROWS)
                assert seen.keys() == set(places)
                same([seen], [{place: expected[place] for place in places}])
                assert (len(run) == len(names)) == (places[0][1] != names[0])
        with LayerStream(base, texts) as stream:
            with ActivationRecorder(base).only(places) as recorder:
                stream.read(recorder, 0, ROWS)
            stream.advance()  # runs the block to its end
            states = main_stream(stream.states[0])[ROWS]
            torch.testing.assert_close(states.double(), wanted[0][0, "block", "out"], check_dtype=False)
