"""How long the stages of a migration would take here: counted operations and bytes over a short measurement.

An order of magnitude, not a promise. What is counted is the arithmetic of the large products and the bytes read; what
is measured is how fast this machine does such work when it does nothing else. Tiny models take longer (overhead), texts
shorter than the cut-off less.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lorasuite.adapters import Adapter, weight_shape
from lorasuite.bases import ATTENTION, Checkpoint
from lorasuite.planning._config import PairSettings, torch_device
from lorasuite.planning._thresholds import LFT_SAMPLES
from lorasuite.training import FinetuneSettings

#: Bytes of a base's file that are read to time it.
SAMPLE = 32 * 2**20
ASSUMES = (
    "large products and bytes read, over what this machine did in a short measurement; texts and rows of full length, "
    "nothing cached, evaluation left out (it depends on the rows)"
)


@dataclass(frozen=True)
class Throughput:
    """What a machine does in a second.

    ``device``: where forward passes run, and ``forward`` its floating-point operations in their precision;
    ``double``: those of float64 products on the CPU; ``eigen``, ``svd``: the ``d³`` of such a decomposition of a
    ``d × d`` float64 matrix; ``read``: bytes of a weight file read and hashed.
    """

    device: str
    forward: float
    double: float
    eigen: float
    svd: float
    read: float


def measure(base: Checkpoint, size: int = 512) -> Throughput:
    """Time one product and decomposition of each kind, and the start of a weight file: about a second."""
    device = torch_device("auto")
    x = torch.randn(2 * size, 2 * size, device=device, dtype=torch.bfloat16 if device != "cpu" else torch.float32)
    y = torch.randn(size, size, dtype=torch.float64)
    small = y[: size // 2, : size // 2]

    def product() -> None:
        (x @ x).sum().item()  # waits for the device

    start, read = time.perf_counter(), 0
    with base.weight_files[0].open("rb") as handle:
        digest = hashlib.sha256()
        while read < SAMPLE and (chunk := handle.read(2**20)):
            digest.update(chunk)
            read += len(chunk)
    seconds = max(time.perf_counter() - start, 1e-9)
    return Throughput(
        device=device,
        forward=2 * x.shape[0] ** 3 / _best(product),
        double=2 * size**3 / _best(lambda: y @ y),
        eigen=small.shape[0] ** 3 / _best(lambda: torch.linalg.eigh(small + small.T)),
        svd=small.shape[0] ** 3 / _best(lambda: torch.linalg.svd(small)),
        read=read / seconds,
    )


def _best(action: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest of some runs, after one to warm up."""
    action()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return max(min(found), 1e-9)


def estimate(old: Checkpoint, new: Checkpoint, adapter: Adapter | None, speed: Throughput) -> dict[str, Any]:
    """Seconds a stage at default settings, with the measured numbers and what was assumed. JSON-able."""
    pair, tuning = PairSettings(), FinetuneSettings()
    tokens = pair.calibration_samples * pair.calibration_cutoff
    d_o, d_n = old.dims.hidden_size, new.dims.hidden_size
    depth = min(old.dims.layers, new.dims.layers)
    roles = tuple(adapter.roles(old.architecture)) if adapter is not None else ATTENTION
    moved = [role for role in roles if role in new.architecture.roles]
    reading = sum(f.stat().st_size for base in (old, new) for f in base.weight_files) / speed.read
    stages = {
        # read and hashed, and once more to look for damaged tensors
        "fingerprint": 2 * reading,
        "transfer_matrices": _hidden_map(old, new, speed),
        "mlp_factors": depth * sum(_factor(old, speed) for role in moved if role not in ATTENTION),
        "activations": 2 * tokens * (active(old) + active(new)) / speed.forward,
        "head_mapping": 2 * depth * _heads(old, new) / speed.double,
    }
    if adapter is not None:
        dense = [path for path in adapter.modules if old.architecture.locate(path)] if not adapter.stored else []
        shapes = [weight_shape(old, path) for path in dense]
        stages["read_adapter"] = sum(min(shape) ** 2 * max(shape) for shape in shapes) / speed.svd
        # W_h and each projection's weight once, times the rank; at a small rank, reading the weights takes longer
        carried = sum(2 * old.dims.rows(role) * old.dims.columns(role) + 2 * d_o * d_n for role in moved)
        stages["transform"] = 2 * depth * adapter.rank * carried / speed.double + reading
    rows = LFT_SAMPLES * tuning.cutoff * tuning.epochs
    stages["finetune"] = 6 * rows * active(new) / speed.forward
    stages["finetune (control)"] = stages["finetune"]
    return {"seconds": stages, "total": sum(stages.values()), "measured": asdict(speed), "assumes": ASSUMES}


def active(base: Checkpoint) -> int:
    """Weights that one token is multiplied with: all matrices but the input embedding, experts by their share."""
    settings = base.architecture.settings(base.config)
    experts = next((n for key in ("num_local_experts", "num_experts") if (n := settings.get(key))), 0)
    share = settings.get("num_experts_per_tok", 1) / experts if experts else 1
    embedding = base.find(base.architecture.embedding + ".weight")
    total = 0.0
    for name, shape in base.shapes().items():
        if len(shape) > 1 and (name != embedding or base.architecture.tied(base.config)):
            total += math.prod(shape) * (share if ".experts." in name else 1)
    return int(total)


def _hidden_map(old: Checkpoint, new: Checkpoint, speed: Throughput) -> float:
    """Gram and cross products over the vocabulary, an eigenvalue problem, a pseudo-inverse; nothing for equal sizes."""
    d_o, d_n = old.dims.hidden_size, new.dims.hidden_size
    if d_o == d_n:
        return 0.0
    tokens = min(old.dims.vocab_size, new.dims.vocab_size)
    products = 2 * tokens * d_o * (d_o + d_n) + 2 * d_o**2 * d_n
    return products / speed.double + d_o**3 / speed.eigen + min(d_o, d_n) ** 2 * max(d_o, d_n) / speed.svd


def _factor(old: Checkpoint, speed: Throughput) -> float:
    """The Gram matrix of one layer's MLP weight and its pseudo-inverse."""
    d, i = old.dims.hidden_size, old.dims.intermediate_size
    return (2 * i * d * d + 2 * d**3) / speed.double + d**3 / speed.eigen


def _heads(old: Checkpoint, new: Checkpoint) -> int:
    """Multiplications of one layer pair's head similarity: four products, and ``W_h`` on the old side."""
    d_n = new.dims.hidden_size
    inner = [(b.dims.columns(r) if r == "o" else b.dims.rows(r)) for b in (old, new) for r in ATTENTION]
    sides = list(zip(inner[:4], inner[4:], strict=True))
    carried = 0 if old.dims.hidden_size == d_n else sum(a for a, _ in sides) * old.dims.hidden_size * d_n
    return sum(a * b * d_n for a, b in sides) + carried
