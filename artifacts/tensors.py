"""Writing a safetensors file one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from artifacts.keys import canonical_json

_CHUNK = 4 * 1024 * 1024

#: The dtype names of the safetensors format.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class _Written(NamedTuple):
    dtype: str
    shape: list[int]
    start: int  # offset in the scratch file
    size: int
    align: int
    sha256: str


def write_tensors(
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]], path: Path
) -> tuple[str, str]:
    """Write ``tensors`` to the safetensors file ``path`` and return its digest and the file's SHA-256.

    Only one tensor is in memory at a time: an iterator's bytes go to a scratch file beside ``path``, and from
    there behind the header, which needs all names and sizes. Needs twice the disk space while it runs. The
    order in the file does not depend on the order given: widest dtype first, so that every tensor is aligned,
    then by name. Raises ``TypeError`` for what cannot be stored and ``ValueError`` for a name given twice.
    """
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    scratch = path.with_name(path.name + ".scratch")
    written: dict[str, _Written] = {}
    try:
        with scratch.open("w+b") as raw:
            for name, tensor in pairs:
                if not isinstance(name, str) or not name or name == "__metadata__":
                    raise TypeError(f"{name!r} cannot be the name of a tensor")
                if name in written:
                    raise ValueError(f"the tensor {name!r} was given twice")
                written[name] = _append(raw, name, tensor)
            raw.flush()
            order = sorted(written, key=lambda name: (-written[name].align, name))
            sha256 = _assemble(raw, path, {name: written[name] for name in order})
    finally:
        scratch.unlink(missing_ok=True)
    entries = [[name, entry.dtype, entry.shape, entry.sha256] for name, entry in sorted(written.items())]
    return hashlib.sha256(canonical_json(entries, "tensors")).hexdigest(), sha256


def _append(raw: BinaryIO, name: str, tensor: torch.Tensor) -> _Written:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name!r} is a {type(tensor).__name__}, not a tensor")
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.dtype not in _DTYPES:
        raise TypeError(f"{name!r} cannot be stored: {tensor.dtype}, {tensor.layout}, on {tensor.device.type}")
    start = raw.tell()
    # .resolve_conj/.resolve_neg: lazily conjugated complex tensors hold other bytes than their values
    values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    data = values.view(torch.uint8).numpy() if values.numel() else np.empty(0, np.uint8)
    raw.write(data.data)
    return _Written(
        dtype=_DTYPES[tensor.dtype],
        shape=list(tensor.shape),
        start=start,
        size=data.nbytes,
        align=tensor.element_size(),
        sha256=hashlib.sha256(data.data).hexdigest(),
    )


def _assemble(raw: BinaryIO, path: Path, entries: Mapping[str, _Written]) -> str:
    header: dict[str, object] = {}
    offset = 0
    for name, entry in entries.items():
        header[name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [offset, offset + entry.size],
        }
        offset += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha256 = hashlib.sha256()
    with path.open("wb") as out:
        for block in (struct.pack("<Q", len(text)), text):
            out.write(block)
            sha256.update(block)
        for entry in entries.values():
            raw.seek(entry.start)
            left = entry.size
            while left:
                block = raw.read(min(_CHUNK, left))
                if not block:
                    raise OSError(f"{path.name}: the scratch file ended early")
                out.write(block)
                sha256.update(block)
                left -= len(block)
    return sha256.hexdigest()
