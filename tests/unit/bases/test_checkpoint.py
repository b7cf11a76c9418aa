"""Base models from disk: what is read, what is refused, and what a fingerprint depends on."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasuite.bases import (
    METER,
    Checkpoint,
    file_digest,
    fingerprint_model,
    fingerprint_tokenizer,
    load_model,
    load_tokenizer,
    resolve,
)
from lorasuite.errors import ArchitectureError, CheckpointError, LoRASuiteError
from tests import models
from tests.unit import oracle

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


@pytest.fixture
def copied(base: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A private copy of a shared model, to damage."""

    def make(family: str = "llama", **numbers: Any) -> Path:
        target = tmp_path / f"{family}-copy"
        shutil.copytree(base(family, **numbers), target)
        return target

    return make


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(path / WEIGHTS)
    edit(state)
    save_file(state, path / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_weight_is_the_one_of_the_model(family: str, base: Callable[..., Path]) -> None:
    path = base(family)
    checkpoint, dense = Checkpoint(path), oracle.read(path)
    assert checkpoint.check() == []
    torch.testing.assert_close(checkpoint.embedding().double(), dense.E, rtol=1e-6, atol=0)
    for n, block in enumerate(dense.layers):
        ours = checkpoint.layer(n, checkpoint.architecture.roles)
        assert set(ours) == set(checkpoint.roles(n))
        assert set(ours) == set(block)
        for role, weight in ours.items():
            assert weight.dtype == torch.float32 and torch.equal(weight.double(), block[role])
    assert set(checkpoint.layer(0, ("q", "v"))) == {"q", "v"} & set(checkpoint.roles(0))


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_sharded_equals_unsharded(family: str, base: Callable[..., Path]) -> None:
    whole, parts = Checkpoint(base(family)), Checkpoint(base(family, shard="20KB"))
    assert len(parts.weight_files) > 2 and (parts.path / INDEX).is_file() and not (whole.path / INDEX).is_file()
    assert parts.check() == []
    assert set(parts.shards) == set(whole.shards)
    for name in whole.shards:
        assert torch.equal(whole.tensor(name), parts.tensor(name)) and whole.shape(name) == parts.shape(name)


def test_a_single_file_wins_over_an_index_as_in_transformers(
    copied: Callable[..., Path], base: Callable[..., Path]
) -> None:
    path = copied()
    for file in base("llama", seed=5, shard="20KB").glob("model*"):
        shutil.copy(file, path)
    ours = Checkpoint(path).embedding()
    assert torch.equal(ours, models.load(path).get_input_embeddings().weight)


def test_half_precision_is_read_as_float32(base: Callable[..., Path]) -> None:
    half = Checkpoint(base("llama", dtype=torch.bfloat16))
    weight = half.layer(0, ("q",))["q"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, Checkpoint(base("llama")).layer(0, ("q",))["q"].bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_weights_of_16_bits_as_they_are_stored(family: str, dtype: torch.dtype, base: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(base(family, dtype=dtype))
    roles = checkpoint.roles(0)
    whole, stored = checkpoint.layer(0, roles), checkpoint.layer(0, roles, as_stored=True)
    for role, weight in whole.items():
        assert stored[role].dtype == (dtype if dtype.itemsize == 2 else torch.float32) and weight.dtype == torch.float32
        assert torch.equal(stored[role].float(), weight)


def test_bloom_without_its_prefix(copied: Callable[..., Path], base: Callable[..., Path]) -> None:
    path = copied("bloom")

    def strip(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            state[name.removeprefix("transformer.")] = state.pop(name)

    change(path, strip)
    bare, full = Checkpoint(path), Checkpoint(base("bloom"))
    assert not any(name.startswith("transformer.") for name in bare.shards)
    assert bare.check() == []
    assert torch.equal(bare.embedding(), full.embedding())
    for role, weight in full.layer(2, full.architecture.roles).items():
        assert torch.equal(bare.layer(2, bare.architecture.roles)[role], weight)


def test_missing_shards_are_all_named(base: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "gone"
    shutil.copytree(base("llama", shard="20KB"), path)
    gone = sorted(path.glob("model-*.safetensors"))[1:3]
    for file in gone:
        file.unlink()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path).embedding()
    assert [p.where for p in caught.value.problems] == [str(file) for file in gone]
    assert isinstance(caught.value, OSError)
    assert [p.where for p in Checkpoint(path).check()] == [str(file) for file in gone]


def test_a_tensor_its_shard_does_not_hold_is_missing(base: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "moved"
    shutil.copytree(base("llama", shard="20KB"), path)
    index = json.loads((path / INDEX).read_text())
    name = "model.embed_tokens.weight"
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"][name])
    index["weight_map"][name] = other
    (path / INDEX).write_text(json.dumps(index))
    assert name in " ".join(map(str, Checkpoint(path).check()))
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight"):
        Checkpoint(path).embedding()


def test_missing_tensors_are_all_named(copied: Callable[..., Path]) -> None:
    path = copied()
    gone = ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.layers.2.mlp.up_proj.weight"]
    change(path, lambda state: [state.pop(name) for name in gone])
    checkpoint = Checkpoint(path)
    problems = checkpoint.check()
    assert len(problems) == 3
    assert all(any(name in str(problem) for problem in problems) for name in gone)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj\.weight is missing"):
        checkpoint.layer(1, ("k",))
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoint.shape(gone[0])


def test_shapes_that_do_not_fit_the_config(copied: Callable[..., Path]) -> None:
    path = copied()
    models.edit_json(path / "config.json", hidden_size=64, head_dim=8)
    problems = Checkpoint(path).check()
    assert len(problems) == 1 + 3 * 7
    assert any("embed_tokens" in p.where and "hidden size 64" in p.what for p in problems)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_with_nan_or_inf_is_refused(value: float, dtype: torch.dtype, copied: Callable[..., Path]) -> None:
    path = copied(dtype=dtype)

    def damage(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.0.self_attn.q_proj.weight"][3, 4] = value

    change(path, damage)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight holds NaN or Inf"):
        Checkpoint(path).layer(0, ("q",))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight holds NaN or Inf"):
        Checkpoint(path).layer(0, ("q",), as_stored=True)
    Checkpoint(path).layer(1, ("q",))


def test_pickle_only_is_refused(copied: Callable[..., Path]) -> None:
    path = copied()
    (path / WEIGHTS).rename(path / "pytorch_model.bin")
    for use in (lambda: Checkpoint(path).embedding(), lambda: fingerprint_model(path)):
        with pytest.raises(CheckpointError, match="pickle weights only"):
            use()
    assert "pickle" in str(Checkpoint(path).check()[0])
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        Checkpoint(path).embedding()


def test_files_that_cannot_be_read(copied: Callable[..., Path]) -> None:
    path = copied()
    (path / WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        Checkpoint(path).embedding()
    for text, what in (("{", "not valid JSON"), ("[1]", "no JSON object"), ('{"model_type": "rwkv"}', "unknown arch")):
        (path / "config.json").write_text(text)
        with pytest.raises(LoRASuiteError, match=what):
            Checkpoint(path)
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        Checkpoint(path)


def test_a_truncated_file_is_refused(copied: Callable[..., Path]) -> None:
    path = copied()
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        Checkpoint(path).embedding()


def test_sources_that_are_no_directory(tmp_path: Path, copied: Callable[..., Path]) -> None:
    file = copied() / "config.json"
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(file)
    with pytest.raises(CheckpointError, match="not a Hub id"):
        resolve(tmp_path / "no" / "such")
    with pytest.raises(CheckpointError, match="the Hub did not give it"):
        resolve("nobody/no-such-model")


def test_the_fingerprint_does_not_depend_on_the_path(copied: Callable[..., Path], base: Callable[..., Path]) -> None:
    path = copied()
    models.edit_json(path / "config.json", _name_or_path="elsewhere", transformers_version="0.0", use_cache=False)
    assert fingerprint_model(path) == fingerprint_model(base("llama"))
    assert fingerprint_tokenizer(path) == fingerprint_tokenizer(base("llama"))


def test_one_weight_bit_changes_the_fingerprint(copied: Callable[..., Path]) -> None:
    path = copied()
    before = fingerprint_model(path)
    raw = bytearray((path / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (path / WEIGHTS).write_bytes(bytes(raw))
    assert fingerprint_model(path) != before
    raw[-1] ^= 1
    (path / WEIGHTS).write_bytes(bytes(raw))
    assert fingerprint_model(path) == before


def test_what_else_the_fingerprints_depend_on(copied: Callable[..., Path]) -> None:
    path = copied()
    model, tokenizer = fingerprint_model(path), fingerprint_tokenizer(path)
    models.edit_json(path / "config.json", rms_norm_eps=1e-3)
    assert fingerprint_model(path) != model
    assert fingerprint_tokenizer(path) == tokenizer
    text = (path / "tokenizer.json").read_text()
    (path / "tokenizer.json").write_text(text.replace("w5", "x5"))
    assert fingerprint_tokenizer(path) != tokenizer
    for file in path.glob("*token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer files"):
        fingerprint_tokenizer(path)


def test_a_remembered_digest_is_forgotten_when_the_file_changes(tmp_path: Path) -> None:
    file, cache = tmp_path / "x", {}
    file.write_bytes(b"one")
    assert file_digest(file, cache) and not cache  # so young that it may change again without another time
    time.sleep(0.15)
    first = file_digest(file, cache)
    assert file_digest(file, cache) == first and len(cache) == 1
    times = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as tar --mtime and many editors do
    assert file_digest(file, cache) == file_digest(file) != first
    other = tmp_path / "other"
    other.write_bytes(b"six")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.rename(file)
    assert file_digest(file, cache) == file_digest(file) == hashlib.sha256(b"six").hexdigest()


def test_blobs_of_the_hub_cache_give_the_digest_of_their_content(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links to blobs named by their sha256 are not read again, and the fingerprint is that of the plain directory."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    plain, repository = base("llama"), tmp_path / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in plain.iterdir():
        kind = hashlib.sha256 if file.suffix == ".safetensors" else hashlib.sha1  # as large and small files of the Hub
        blob = blobs / kind(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    assert fingerprint_model(snapshot) == fingerprint_model(plain)
    assert fingerprint_tokenizer(snapshot) == fingerprint_tokenizer(plain)
    unread = blobs / ("ab" * 32)
    unread.touch()
    assert file_digest(unread) == "ab" * 32
    for folder in (tmp_path, tmp_path / "blobs", tmp_path.parent / "models--org--name" / "blobs"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / unread.name).write_bytes(b"one")
        assert file_digest(folder / unread.name) == hashlib.sha256(b"one").hexdigest()


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_meter_counts_what_is_alive(family: str, base: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(base(family))
    gc.collect()
    before = METER.current
    weights = checkpoint.layer(0, ("q", "k", "v"))
    assert METER.current - before == 3 * 32 * 32 * 4
    view = weights.pop("q")[:2]
    weights.clear()
    gc.collect()
    assert METER.current - before >= 32 * 32 * 4
    METER.reset()
    assert METER.peak == METER.current
    del view
    gc.collect()
    assert METER.current == before


def test_whole_models_load_frozen_and_failures_are_explained(base: Callable[..., Path], tmp_path: Path) -> None:
    model = load_model(base("llama"))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert load_tokenizer(base("llama"))("w0 w1")["input_ids"] == [4, 5]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: is missing"):
        load_model(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path / "empty")


def test_an_unknown_architecture_is_named(copied: Callable[..., Path]) -> None:
    path = copied()
    models.edit_json(path / "config.json", model_type="qwen_2")
    with pytest.raises(ArchitectureError, match="Did you mean 'qwen2'"):
        Checkpoint(path)
