"""What this machine has, and does in a second: measured, in about a second in all."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from lorasuite.bases import Dimensions, free_ram, ram
from lorasuite.planning._cost import FLOAT, Ops

#: Bytes of a base's file that are read to time it.
SAMPLE = 32 * 2**20
#: Tokens, and widths at most, of the block that forward passes are timed on.
TOKENS, WIDTH, INNER = 256, 1024, 4096
#: Rank of the LoRA that fine-tunes are timed with.
RANK = 16
#: Tokens that another dtype is tried on first, and seconds from which on no more are.
FEWEST, LONG = 2, 0.05
#: Seconds that Python takes for an entry of a vocabulary: split, normalised and compared.
ITEM_SECONDS = 5e-6


@dataclass(frozen=True)
class Throughput:
    """What a machine does in a second.

    ``device``: where models run, and ``forward`` the floating-point operations of an MLP block in the dtype they run
    in; ``trained`` the same of one with a LoRA, there and back (0: not measured, as ``forward``); ``single`` and
    ``double`` those of float32 and float64 products on the CPU; ``eigen`` and ``svd`` the ``d³`` of a decomposition of
    a ``d × d`` float64 matrix; ``read`` bytes of a weight file read and hashed; ``streamed`` bytes of weights that a
    product with one vector reads from memory.
    """

    device: str
    forward: float
    single: float
    double: float
    eigen: float
    svd: float
    read: float
    streamed: float
    trained: float = 0.0

    def seconds(self, ops: Ops) -> float:
        """How long such work takes when nothing else runs."""
        spent = (
            ops.forward / self.forward
            + ops.trained / (self.trained or self.forward)
            + ops.single / self.single
            + ops.double / self.double
            + ops.eigen / self.eigen
            + ops.svd / self.svd
            + (ops.read + ops.written) / self.read
            + ops.streamed / self.streamed
        )
        return spent + ops.items * ITEM_SECONDS


def measure(dims: Dimensions, file: Path, device: str = "cpu", item: float = FLOAT, size: int = 512) -> Throughput:
    """Time a block, products and decompositions of each kind, and the start of a weight file: about a second.

    Args:
        dims: whose widths the block has, up to 1,024 and 4,096.
        file: what is read, up to 32 MiB: of the weights.
        device: where models run.
        item: bytes of a weight there, where texts are read for the pair: float32 for 4, else bfloat16.
        size: columns of the matrices that are multiplied.
    """
    dtype = torch.float32 if item >= FLOAT else torch.bfloat16
    block = _Block(dims, device, dtype)
    single = torch.randn(2 * size, 2 * size)
    y = torch.randn(size, size, dtype=torch.float64)
    small = y[: size // 2, : size // 2]

    return Throughput(
        device=device,
        forward=block.work(TOKENS) / _best(lambda: block.run(TOKENS)),
        single=2 * single.shape[0] ** 3 / _best(lambda: single @ single),
        double=2 * size**3 / _best(lambda: y @ y),
        eigen=small.shape[0] ** 3 / _best(lambda: torch.linalg.eigh(small + small.T)),
        svd=small.shape[0] ** 3 / _best(lambda: torch.linalg.svd(small)),
        read=_reading(file),
        streamed=_streaming(device, dtype, size),
        trained=block.tuned(TOKENS),
    )


def in_dtype(speed: Throughput, dims: Dimensions, dtype: torch.dtype, size: int = 512) -> Throughput:
    """The same machine where models run in another dtype, in about a second.

    A CPU without instructions for 16 bits takes a hundred times as long as in float32, so that few tokens are timed
    there.
    """
    block, tokens = _Block(dims, speed.device, dtype), FEWEST
    while (spent := _best(partial(block.run, tokens), repeats=2)) < LONG and tokens < TOKENS:
        tokens = min(4 * tokens, TOKENS)
    forward, streamed = block.work(tokens) / spent, _streaming(speed.device, dtype, size)
    return replace(speed, forward=forward, streamed=streamed, trained=block.tuned(tokens))


class _Block:
    """An MLP block of a base's widths, that tokens are run through."""

    def __init__(self, dims: Dimensions, device: str, dtype: torch.dtype) -> None:
        d, i = min(dims.hidden_size, WIDTH), min(dims.intermediate_size, INNER)
        self.d, self.i = d, i
        self.x = torch.randn(TOKENS, d, device=device, dtype=dtype)
        shapes = ((d, i), (d, i), (i, d))
        self.up, self.gate, self.down = (torch.randn(*s, device=device, dtype=dtype) / s[0] for s in shapes)
        #: Of each, the factors of a LoRA, which are float32 whatever the base is.
        factors = [(torch.randn(a, RANK, device=device), torch.zeros(RANK, b, device=device)) for a, b in shapes]
        self.lora = [(a.requires_grad_(), b.requires_grad_()) for a, b in factors]

    def work(self, tokens: int) -> float:
        """Floating-point operations."""
        return 6.0 * tokens * self.d * self.i

    def run(self, tokens: int) -> None:
        """Wait until so many tokens have gone through it."""
        x = self.x[:tokens]
        h = torch.nn.functional.layer_norm(x, (self.d,))
        (x + (torch.nn.functional.silu(h @ self.gate) * (h @ self.up)) @ self.down).sum().item()

    def tuned(self, tokens: int) -> float:
        """Floating-point operations a second of a fine-tune: four a weight and token, six a LoRA's."""
        passed = 4.0 * 3 * self.d * self.i + 6.0 * 3 * RANK * (self.d + self.i)
        return tokens * passed / _best(partial(self.tune, tokens), repeats=2)

    def tune(self, tokens: int) -> None:
        """Wait until so many tokens have gone through it with its LoRA, and their gradients back."""
        x = self.x[:tokens].clone().requires_grad_()
        h = torch.nn.functional.layer_norm(x, (self.d,))
        up, gate, down = zip((self.up, self.gate, self.down), self.lora, strict=True)
        y = x + _adapted(torch.nn.functional.silu(_adapted(h, *gate)) * _adapted(h, *up), *down)
        y.float().sum().backward()
        y.flatten()[0].item()


def _adapted(x: torch.Tensor, weight: torch.Tensor, lora: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """What a linear module gives with a LoRA, as PEFT computes it: the LoRA's products in float32."""
    return x @ weight + (x.float() @ lora[0] @ lora[1]).to(weight.dtype)


def _streaming(device: str, dtype: torch.dtype, size: int) -> float:
    """Bytes of weights a second in products with one vector."""
    wide = torch.randn(4 * size, 4 * size, device=device, dtype=dtype)
    return wide.nbytes / _best(lambda: (wide[:1] @ wide).sum().item())


def _reading(file: Path) -> float:
    """Bytes of a file that are read and hashed in a second."""
    start, read = time.perf_counter(), 0
    with file.open("rb") as handle:
        digest = hashlib.sha256()
        while read < SAMPLE and (chunk := handle.read(2**20)):
            digest.update(chunk)
            read += len(chunk)
    return read / max(time.perf_counter() - start, 1e-9)


def _best(action: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest of some runs, after one to warm up."""
    action()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return max(min(found), 1e-9)


@dataclass(frozen=True)
class Machine:
    """Bytes that this machine has: RAM in all and free, the same of the GPU (None without one), free on the disk that
    the artifacts go to (None where no disk was named), and of artifacts that lie there already.

    ``spread``: all that bases have which are spread (``--device-map auto``), every GPU and the RAM; None where none is.
    """

    ram: int
    ram_free: int
    gpu: int | None = None
    gpu_free: int | None = None
    disk_free: int | None = None
    disk_stored: int = 0
    spread: int | None = None
    spread_free: int | None = None

    @classmethod
    def here(cls, device: str, home: Path | None) -> Machine:
        """Of this machine or control group, with the GPU of ``device`` and the disk of ``home``."""
        gpu = gpu_free = None
        if device.startswith("cuda"):
            gpu_free, gpu = torch.cuda.mem_get_info(torch.device(device))
        disk, stored = None, 0
        if home is not None:
            standing = next(one for one in (home.absolute(), *home.absolute().parents) if one.exists())
            disk = shutil.disk_usage(standing).free
            stored = sum(file.stat().st_size for file in (home / "objects").glob("*/*/data.safetensors"))
        return cls(ram(), free_ram(), gpu, gpu_free, disk, stored)

    def spreading(self) -> Machine:
        """The same, where bases are spread over all GPUs and the RAM."""
        gpus = [torch.cuda.mem_get_info(n) for n in range(torch.cuda.device_count())]
        free, there = (sum(sizes) for sizes in zip(*gpus, strict=True))
        return replace(self, spread=self.ram + there, spread_free=self.ram_free + free)
