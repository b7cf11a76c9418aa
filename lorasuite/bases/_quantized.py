"""Quantized checkpoints: told apart from plain ones, and read back as numbers where that is a multiplication.

Three layouts store one number a weight and its scale beside it: FP8 (``weight_scale_inv`` of blocks of 128×128 in the
way of DeepSeek-V3, arXiv 2412.19437 section 3.3, or one ``weight_scale`` a tensor or an output channel), 8-bit
integers of compressed-tensors (``weight_scale``, ``weight_zero_point``) and those of bitsandbytes (``SCB``: the largest
magnitude of each output channel, LLM.int8(), arXiv 2208.07339). These are dequantized a tensor at a time. Formats that
pack several weights into a number (GPTQ, AWQ, nf4, MXFP4, NVFP4, GGUF …) are refused: the tensors of such a file are no
weights and must never be read as if they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasuite.errors import CheckpointError, Problem

#: Methods whose checkpoints may be read: whether one can be is decided by its tensors.
READABLE = ("fp8", "fbgemm_fp8", "compressed-tensors", "bitsandbytes", "modelopt")
#: Compressed-tensors formats that store one number a weight.
UNPACKED = ("float-quantized", "int-quantized", "naive-quantized", "dense")
#: Fields of a config that say how a checkpoint is quantized.
FIELDS = ("quantization_config", "compression_config")
#: Ends of the names of tensors that only packed formats have, and the method each speaks of.
PACKED = {
    ".qweight": "gptq or awq", ".qzeros": "gptq or awq",
    ".weight.absmax": "bitsandbytes", ".weight.quant_map": "bitsandbytes",
    ".weight_packed": "compressed-tensors", ".weight_global_scale": "nvfp4", ".weight_scale_2": "nvfp4",
    "_proj_blocks": "mxfp4", ".weight_scales": "eetq", ".weight.bitmask": "compressed-tensors",
    ".compressed": "compressed-tensors", ".W_q": "hqq", ".weight._data": "quanto", ".weight:_data": "quanto",
}  # fmt: skip
#: What stands beside a quantized weight, by the end of its name; the rest of a name is the weight's module.
SCALES = (".weight_scale_inv", ".weight_scale", ".SCB")
#: Names that end so belong to a quantized weight, and are no weights themselves.
BESIDE = (
    *SCALES,
    ".weight_zero_point",
    ".weight_format",
    ".input_scale",
    ".output_scale",
    ".weight_shape",
    ".weight_g_idx",
)
#: The largest magnitude of LLM.int8()'s integers.
INT8 = 127
#: dtypes of safetensors headers that no plain weight has.
LOW = {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "F4", "I8", "U8", "I16", "U16", "I32", "U32"}
REMEDY = "Give the unquantized base that it was made from"


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized.

    ``method`` is what its config says, or its tensors where the config is silent; ``why`` says why it cannot be read,
    and is empty where it is dequantized on reading. ``blocks`` are the rows and columns that share a scale, where the
    config gives them.
    """

    method: str
    why: str = ""
    blocks: tuple[int, ...] = ()

    def problem(self, where: str) -> Problem:
        """What a user is told of a checkpoint that cannot be read."""
        return Problem(where, f"is quantized (quant_method={self.method}){self.why and f', {self.why}'}", REMEDY + ".")

    def notice(self) -> str:
        """What a user is told of one that can."""
        return f"is quantized (quant_method={self.method}): its weights are dequantized as they are read"


def declared(config: Mapping[str, Any]) -> Quantization | None:
    """What a config says of quantization; None where it says nothing.

    Args:
        config: ``config.json``, that of a text model inside included.
    """
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    said = next((part[field] for part in (config, inner) for field in FIELDS if part.get(field)), None)
    if not isinstance(said, dict):
        return None
    method = str(said.get("quant_method") or ("compressed-tensors" if "config_groups" in said else "unknown"))
    form = str(said.get("format") or "")
    if method == "bitsandbytes" and (said.get("load_in_4bit") or said.get("_load_in_4bit")):
        why = f"{said.get('bnb_4bit_quant_type') or '4-bit'} weights packed two a byte"
    elif method == "compressed-tensors" and form and form not in UNPACKED:
        why = f"format {form}"
    elif method == "compressed-tensors" and (said.get("transform_config") or _sparse(said)):
        why = "its weights are transformed or sparse"
    elif method not in READABLE:
        why = "which packs its weights"
    else:
        why = ""
    size = said.get("weight_block_size") or _block_structure(said)
    return Quantization(method, why, tuple(int(n) for n in size) if size else ())


def _sparse(said: Mapping[str, Any]) -> bool:
    form = (said.get("sparsity_config") or {}).get("format")
    return form not in (None, "dense")


def _block_structure(said: Mapping[str, Any]) -> Any:
    """The blocks of compressed-tensors' groups, where they all have the same."""
    groups = [
        group.get("weights") or {} for group in (said.get("config_groups") or {}).values() if isinstance(group, dict)
    ]
    found = {tuple(group["block_structure"]) for group in groups if group.get("block_structure")}
    return found.pop() if len(found) == 1 else None


def found(config: Mapping[str, Any], dtypes: Mapping[str, str]) -> Quantization | None:
    """How a checkpoint is quantized, by its config and the headers of its files; None for a plain one.

    Args:
        dtypes: tensor name → dtype as safetensors names it (``F8_E4M3``, ``I8``).
    """
    said = declared(config)
    if said is not None and said.why:
        return said
    packed = next((method for name in dtypes for end, method in PACKED.items() if name.endswith(end)), None)
    blocks = said.blocks if said else ()
    if packed is not None:
        return Quantization(said.method if said else packed, "which packs its weights", blocks)
    low = [name for name, dtype in dtypes.items() if dtype in LOW and name.endswith(".weight")]
    lone = next((name for name in low if scale_of(name, dtypes) is None), None)
    if lone is not None:
        method = said.method if said else dtypes[lone].lower()
        return Quantization(method, f"and {lone} ({dtypes[lone]}) has no scale beside it", blocks)
    if low:
        return said or Quantization("bitsandbytes" if any(name.endswith(".SCB") for name in dtypes) else "fp8")
    return None  # a config may say so of weights that were dequantized since


def scale_of(name: str, names: Collection[str]) -> str | None:
    """The name of the scale beside a weight; None where there is none."""
    stem = name.removesuffix(".weight")
    return next((stem + end for end in SCALES if stem + end in names), None)


def is_beside(name: str) -> bool:
    """Whether a tensor belongs to a quantized weight and is none itself."""
    return name.endswith(BESIDE)


def dequantized(
    name: str, stored: Tensor, names: Collection[str], get: Callable[[str], Tensor], blocks: tuple[int, ...] = ()
) -> Tensor:
    """A weight as it is stored, or the numbers that a quantized one stands for, in float32.

    Args:
        name: of the tensor.
        stored: the tensor, ``(…, out, in)`` where it is quantized.
        names: of all tensors of the checkpoint.
        get: reads another one.
        blocks: rows and columns that share a scale, where the config gives them.

    Raises:
        CheckpointError: for a tensor of a quantized format that cannot be read here.
    """
    if not _low(stored) or not name.endswith(".weight"):
        return stored
    scale = scale_of(name, names)
    if scale is None:
        raise CheckpointError(Problem(name, f"is quantized ({stored.dtype}) and has no scale beside it", REMEDY + "."))
    stem, values, factor = name.removesuffix(".weight"), stored.float(), get(scale).float()
    if scale.endswith(".SCB"):
        layout = stem + ".weight_format"
        if layout in names and int(get(layout)):
            raise CheckpointError(Problem(name, "is quantized (bitsandbytes) in a layout of one GPU", REMEDY + "."))
        return values.mul_(factor.reshape(-1, 1) / INT8)
    zero = stem + ".weight_zero_point"
    if zero in names:
        values -= _spread(name, get(zero).float(), stored.shape, blocks)
    return values.mul_(_spread(name, factor, stored.shape, blocks))


def _low(tensor: Tensor) -> bool:
    return (tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool) or tensor.dtype in (torch.int16, torch.int32)


def _spread(name: str, scale: Tensor, shape: torch.Size, blocks: tuple[int, ...]) -> Tensor:
    """Scales, each for one tensor, channel, group or block, as a tensor that multiplies one of this shape."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim < len(shape):  # one an output channel
        scale = scale.reshape(*scale.shape, *[1] * (len(shape) - scale.ndim))
    sizes = (1,) * (len(shape) - len(blocks)) + blocks if blocks else (0,) * len(shape)
    for at, (size, have) in enumerate(zip(shape, scale.shape, strict=True)):
        if have in (1, size):
            continue
        block = sizes[at] if sizes[at] and math.ceil(size / sizes[at]) == have else size / have
        if block != int(block):
            what = (
                f"is {tuple(shape)} and its scales are {tuple(scale.shape)}, which no block size of the config explains"
            )
            raise CheckpointError(Problem(name, what, REMEDY + "."))
        scale = scale.repeat_interleave(int(block), dim=at).narrow(at, 0, size)
    return scale


def gguf_files(folder: Path) -> list[Path]:
    """The GGUF files of a directory."""
    return sorted(folder.glob("*.gguf"))


def gguf_problem(file: Path) -> Problem:
    """What a user is told of a GGUF file given as a base."""
    return Quantization("gguf", "a file of llama.cpp").problem(str(file))
