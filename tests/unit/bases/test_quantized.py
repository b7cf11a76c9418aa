"""Quantized checkpoints are dequantized as they are read, or refused in one line; never read as plain weights."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasuite.bases import Checkpoint, LayerStream, StreamedBase, Weights, load_model, streamed_base
from lorasuite.errors import CheckpointError, LoRASuiteError
from lorasuite.planning import inspect

#: By kind: how one weight is stored, by the end of the names of its tensors, and what it stands for.
Kind = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def blocks(size: int, end: str = ".weight_scale_inv") -> Kind:
    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = (math.ceil(n / size) for n in weight.shape)
        scale = torch.empty(rows, columns)
        stored, meant = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
        for r in range(rows):
            for c in range(columns):
                at = slice(r * size, (r + 1) * size), slice(c * size, (c + 1) * size)
                scale[r, c] = weight[at].abs().max() / 448
                stored[at] = (weight[at] / scale[r, c]).to(torch.float8_e4m3fn)
                meant[at] = stored[at].float() * scale[r, c]
        return {".weight": stored, end: scale}, meant

    return quantize


def fp8_tensor(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().max() / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {".weight": stored, ".weight_scale": scale, ".input_scale": torch.ones(())}, stored.float() * scale


def fp8_channel(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {".weight": stored, ".weight_scale": scale}, stored.float() * scale.float()


def int8_channel(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = (high - low) / 255
    zero = (-128 - low / scale).round().to(torch.int8)
    stored = (weight / scale + zero).round().clamp(-128, 127).to(torch.int8)
    parts = {".weight": stored, ".weight_scale": scale, ".weight_zero_point": zero}
    return parts, (stored.float() - zero.float()) * scale


def bnb_int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    largest = weight.abs().amax(1)
    stored = (weight / largest[:, None] * 127).round().to(torch.int8)
    parts = {".weight": stored, ".SCB": largest, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, stored.float() * largest[:, None] / 127


COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
READ: dict[str, tuple[Kind, dict[str, Any]]] = {
    "fp8, blocks that do not divide": (blocks(24), {"quant_method": "fp8", "weight_block_size": [24, 24]}),
    "fp8, one block larger than the weight": (blocks(999), {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "fp8, a scale a tensor": (fp8_tensor, {"quant_method": "fp8"}),
    "compressed fp8, a scale a channel": (fp8_channel, COMPRESSED),
    "compressed fp8, blocks": (
        blocks(16, ".weight_scale"),
        COMPRESSED | {"config_groups": {"0": {"weights": {"block_structure": [16, 16]}}}},
    ),
    "compressed int8": (int8_channel, {"quant_method": "compressed-tensors", "format": "int-quantized"}),
    "modelopt fp8": (fp8_tensor, {"quant_method": "modelopt"}),
    "bitsandbytes int8": (bnb_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "fp8, and the config is silent": (fp8_channel, {}),
}


def edited(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewritten(path: Path, kind: Callable[[str, Tensor], dict[str, Tensor]]) -> None:
    state = load_file(path / "model.safetensors")
    made: dict[str, Tensor] = {}
    for name, value in state.items():
        inner = value.ndim == 2 and "layers." in name
        stem = name.removesuffix(".weight")
        made |= {stem + end: part for end, part in kind(stem, value).items()} if inner else {name: value}
    save_file({name: value.contiguous() for name, value in made.items()}, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", READ)
def test_a_number_a_weight_is_dequantized(name: str, base: Callable[..., Path], tmp_path: Path) -> None:
    kind, config = READ[name]
    plain, path = tmp_path / "plain", tmp_path / "quantized"
    shutil.copytree(base("llama"), plain)
    shutil.copytree(base("llama"), path)
    rewritten(plain, lambda _, value: {".weight": kind(value)[1]})
    rewritten(path, lambda _, value: kind(value)[0])
    if config:
        edited(path, quantization_config=config)
    ours, meant = Checkpoint(path), Checkpoint(plain)
    assert ours.check() == [] and ours.quantization is not None and ours.shapes() == meant.shapes()
    for tensor in meant.shapes():
        torch.testing.assert_close(ours.tensor(tensor), meant.tensor(tensor), rtol=1e-6, atol=1e-7)
    ids = torch.arange(3, 20)[None]
    logits = [load_model(folder)(input_ids=ids).logits for folder in (path, plain)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    with streamed_base(path) as streamed, LayerStream(streamed, [ids]) as stream:
        assert isinstance(streamed, StreamedBase)
        state = stream.run(0)
    hidden = load_model(plain)(input_ids=ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(state, hidden, rtol=1e-4, atol=1e-5)
    assert load_model(path, dtype=torch.bfloat16).dtype == torch.bfloat16
    shown = inspect(str(path), str(base("llama")))
    assert shown.problems == [] and "dequantized as they are read" in shown.notices[0]


def packed(*ends: str) -> Callable[[str, Tensor], dict[str, Tensor]]:
    return lambda _, value: {end: torch.zeros(value.shape[0], 4, dtype=torch.int32) for end in ends}


REFUSED: dict[str, tuple[Callable[[str, Tensor], dict[str, Tensor]], dict[str, Any]]] = {
    "gptq": (packed(".qweight", ".qzeros", ".scales"), {"quant_method": "gptq", "bits": 4}),
    "awq": (packed(".qweight", ".qzeros", ".scales"), {"quant_method": "awq", "bits": 4}),
    "bitsandbytes": (
        packed(".weight", ".weight.absmax", ".weight.quant_map"),
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "compressed-tensors": (
        packed(".weight_packed", ".weight_scale"),
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ),
    "mxfp4": (packed("_blocks", "_scales"), {"quant_method": "mxfp4"}),
    "hqq": (packed(".W_q"), {"quant_method": "hqq"}),
}


@pytest.mark.parametrize("silent", [False, True], ids=["config says so", "config is silent"])
@pytest.mark.parametrize("method", REFUSED)
def test_packed_weights_are_refused_in_one_line(
    method: str, silent: bool, base: Callable[..., Path], tmp_path: Path
) -> None:
    kind, config = REFUSED[method]
    path, plain = tmp_path / "quantized", str(base("llama"))
    shutil.copytree(plain, path)
    rewritten(path, kind)
    if not silent:
        edited(path, quantization_config=config)
    for sides in ((str(path), plain), (plain, str(path))):
        (problem,) = inspect(*sides).problems
        assert "is quantized (quant_method=" in problem.what and problem.remedy.startswith("Give the unquantized base")
        assert silent or f"quant_method={method})" in problem.what
    for read in (load_model, lambda folder: Checkpoint(folder).check_readable()):
        with pytest.raises(CheckpointError, match=r"is quantized \(quant_method="):
            read(path)


def test_low_precision_without_a_scale_is_refused(base: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "cast"
    shutil.copytree(base("llama"), path)
    rewritten(path, lambda _, value: {".weight": value.to(torch.float8_e5m2)})
    (problem,) = Checkpoint(path).check()
    assert "has no scale beside it" in problem.what
    with pytest.raises(CheckpointError, match="no scale beside it"):
        Checkpoint(path).tensor("model.layers.0.self_attn.q_proj.weight")


def test_gguf_is_named(base: Callable[..., Path], tmp_path: Path) -> None:
    bare, beside = tmp_path / "bare", tmp_path / "beside"
    bare.mkdir()
    shutil.copytree(base("llama"), beside)
    (beside / "model.safetensors").unlink()
    for folder in (bare, beside):
        (folder / "m.Q4_K_M.gguf").write_bytes(b"GGUF")
    for given in (bare, bare / "m.Q4_K_M.gguf"):
        with pytest.raises(CheckpointError, match=r"m\.Q4_K_M\.gguf: is quantized \(quant_method=gguf\)"):
            Weights(given)
    assert ["quant_method=gguf" in problem.what for problem in Checkpoint(beside).check()] == [True]
    with pytest.raises(LoRASuiteError, match="quant_method=gguf"):
        load_model(beside)


def test_a_config_left_behind_by_dequantization_does_no_harm(base: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "plain"
    shutil.copytree(base("llama"), path)
    edited(path, quantization_config={"quant_method": "fp8"})
    assert Checkpoint(path).check() == [] and Checkpoint(path).quantization is None
    ids = torch.arange(3, 9)[None]
    assert torch.equal(load_model(path)(input_ids=ids).logits, load_model(base("llama"))(input_ids=ids).logits)
