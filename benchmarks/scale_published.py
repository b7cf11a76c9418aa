"""Head mapping and transform the published way, against this project's, on one layer pair of real shapes in one run.

    OMP_NUM_THREADS=1 python benchmarks/scale_published.py qwen-1.5-1.8b qwen-2.5-3b [--keep]

The published way (LoRASuite, arXiv 2505.13515) forms a ``d × d`` matrix for every head (``QᵀK`` and ``VᵀOᵀ``, brought
to the new hidden size), compares them for every pair of heads, carries the adapter's update from head to head as dense
matrices, through the pseudo-inverses of whole MLP weights, and decomposes each dense update by SVD. All of it is done
here in float32, with every product in the cheaper order. Both ways get the same random weights and the same LoRA; what
they give is compared, and the seconds of one layer pair are multiplied by the mapped layers of the two bases. What a
pair of bases needs once (``pinv`` there, the stage ``mlp_factors`` here) is a step of its own. Seconds are the
processor's, so that other work on the machine counts little: with one thread they are what a clock shows on an idle
machine, with more they count each thread, waiting ones too. On a GPU they are the clock's. ``--keep``: for the table of
``scale.py``, beside what it counts.

The floor is what equation 3 cannot do without: one pass over the weights that a step reads, and the operations that
are left when nothing is ``d × d`` that need not be, at the speed of one large float32 product.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.scale_table import PUBLISHED, shape
from benchmarks.shapes import cut, published, write_base, write_lora
from lorasuite.adapters import Adapter, split_update
from lorasuite.bases import ATTENTION, MLP, Checkpoint, Dimensions, Role
from lorasuite.correspondence import TransferMatrix, map_heads, mlp_factor, pseudo_inverse
from lorasuite.planning import Work, pair_costs
from lorasuite.stored import replace_text
from lorasuite.transforms import Migrated, migrate

#: Words of the cut vocabularies, and the adapter's rank.
WORDS, RANK = 256, 16
#: Runs of this project's way, of which the mean is taken; one before them loads what is loaded once a process.
RUNS = 5


class Clock:
    """The processor's seconds of what was computed, by name; the clock's on a GPU, which is waited for."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        """What ``compute`` gives, its time added under the name."""
        mark = self._now()
        found = compute()
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - mark
        return found

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def head_similarity(
    old: Mapping[Role, Tensor], new: Mapping[Role, Tensor], o: Dimensions, n: Dimensions, W: Tensor | None
) -> Tensor:
    """Cosine of ``[vec QK ; vec VO]`` of every pair of heads ``(H_o, H_n)``, from ``d × d`` matrices."""
    theirs = [_head_matrices(new, n, b, None) for b in range(n.heads)]
    table = torch.zeros(o.heads, n.heads)
    for a in range(o.heads):
        mine = _head_matrices(old, o, a, W)
        for b, other in enumerate(theirs):
            table[a, b] = torch.nn.functional.cosine_similarity(mine, other, dim=0)
    return table


def _head_matrices(weights: Mapping[Role, Tensor], dims: Dimensions, head: int, W: Tensor | None) -> Tensor:
    """A query head's ``QᵀK`` and ``VᵀOᵀ``, as one vector ``(2·d²,)``."""
    q, k, v = (_head(weights[role], dims, role, head) for role in ("q", "k", "v"))
    both = [q.T @ k, v.T @ _head(weights["o"].T, dims, "q", head)]
    if W is not None:
        both = [W.T @ one @ W for one in both]
    return torch.cat([one.flatten() for one in both])


def _head(weight: Tensor, dims: Dimensions, role: Role, head: int) -> Tensor:
    """A query head's rows of a weight, or of the key/value head that it reads, ``(e, …)``."""
    at = head if role == "q" else head // dims.group
    return weight[at * dims.head_dim : (at + 1) * dims.head_dim]


def transformed(
    role: Role,
    delta: Tensor,
    old: Tensor,
    new: Tensor,
    dims: tuple[Dimensions, Dimensions],
    heads: Mapping[int, int],
    maps: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    """One dense update ``(out_n, in_n)`` by equation 3, or by the rules of the MLP.

    Args:
        delta: the old update ``(out_o, in_o)``; old, new: the weights.
        maps: ``W_h``, its pseudo-inverse, and that of the old MLP weight; None for the identity.
    """
    o, n = dims
    W, back, inverse = maps
    if role == "down":  # pinv(W_h) · ΔD · pinv(D_o) · W_h · D_n
        assert inverse is not None
        return _times(back, _times(delta @ inverse, W) @ new)
    if role in ("gate", "up"):  # U_n · pinv(W_h) · pinv(U_o) · ΔU · W_h
        assert inverse is not None
        return new @ _times(back, _times(inverse @ delta, W))
    turned = role == "o"  # whose heads are columns
    delta, old, new = (one.T if turned else one for one in (delta, old, new))
    of: Role = "q" if turned else role
    result = torch.zeros(n.heads, n.head_dim, new.shape[1], device=new.device)
    for a, b in heads.items():
        square = _head(old, o, of, a).T @ _head(delta, o, of, a)  # d × d
        square = _times(None if W is None else W.T, _times(square, W))
        result[b] = _head(new, n, of, b) @ square
    if of != "q":
        result = result.reshape(n.kv_heads, n.group, n.head_dim, -1).mean(1)
    moved = result.reshape(-1, new.shape[1])
    return moved.T if turned else moved


def _times(left: Tensor | None, right: Tensor | None) -> Tensor:
    """The product of two matrices, of which one may be the identity."""
    if left is None or right is None:
        found = right if left is None else left
        assert found is not None
        return found
    return left @ right


def measure(configs: Sequence[Mapping[str, Any]], device: str = "cpu") -> dict[str, Any]:
    """Both ways on one layer pair of these shapes, with random weights and a LoRA of every linear module.

    Args:
        configs: of the old and the new model.
        device: of the published way; this project's transform runs on the CPU, its head mapping and factors here.

    Returns:
        ``published``, ``ours`` and ``floor``: seconds by step for the ``layers`` mapped layers of the two bases;
        ``ratio``: of all steps together (a pair's first adapter), of those without what a pair needs once, and of the
        transform alone (each adapter after the first); ``attainable``: the same of the floor; ``differences``:
        relative, of the similarities and of each new update.
    """
    depth = min(config.get("num_hidden_layers") or config["n_layer"] for config in configs)
    theirs, ours, least = Clock(device), Clock(device), Clock(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        old, new = (
            Checkpoint(write_base(folder / str(seed), cut(config, 1, WORDS), seed))
            for seed, config in enumerate(configs)
        )
        adapter = Adapter.open(write_lora(folder / "adapter", old.path, RANK))
        transfer = _random_transfer(old.dims.hidden_size, new.dims.hidden_size)
        roles = [role for role in old.roles(0) if role in new.roles(0)]
        for run in range(1 + RUNS):
            if run == 1:
                ours = Clock(device)
            matched = ours("head_mapping", lambda: map_heads(old, new, {0: 0}, transfer, device=device))[0]
            factors: dict[Role, Tensor] = {
                role: ours("once", partial(mlp_factor, old, 0, role, device)) for role in MLP if role in roles
            }
            moved = ours("transform", partial(_moved, adapter, old, new, matched.heads, transfer, factors))
        ours.seconds = {step: seconds / RUNS for step, seconds in ours.seconds.items()}
        _pass_over(least, old, new, roles)
        a, b = ({r: w.to(device) for r, w in base.layer(0, tuple(roles)).items()} for base in (old, new))
        W, back = (None if one is None else one.float().to(device) for one in (transfer.matrix, transfer.inverse))
        table = theirs("head_mapping", lambda: head_similarity(a, b, old.dims, new.dims, W))
        differences = {"similarity": _difference(matched.similarity, table)}
        deltas = {
            role: part.dense().float().to(device)
            for path, module in next(iter(adapter.by_layer(old).values())).items()
            for role, part in split_update(adapter.update(path, old), module, old.dims).items()
        }
        for path, update in moved.updates.items():
            module = new.architecture.locate(path)
            assert module is not None and len(module[1].roles) == 1, "the published way knows no fused modules"
            role = module[1].roles[0]
            inverse = None
            if role not in ATTENTION:
                inverse = theirs("once", partial(torch.linalg.pinv, a[role]))
            given = role, deltas[role], a[role], b[role], (old.dims, new.dims), matched.heads, (W, back, inverse)
            dense = theirs("transform", partial(transformed, *given))
            u, scale, vh = theirs("transform", partial(torch.linalg.svd, dense, full_matrices=False))
            cut_to = (u[:, :RANK] * scale[:RANK]) @ vh[:RANK]
            differences[role] = _difference(update.dense(), cut_to)
        for step, operations in _operations(configs, roles).items():
            least.seconds[step] += operations / _speed(device)
    sides = {"published": theirs, "ours": ours, "floor": least}
    found = {side: {step: s * depth for step, s in clock.seconds.items()} for side, clock in sides.items()}
    return {
        **found,
        "layers": depth,
        "ratio": _ratios(found["published"], found["ours"]),
        "attainable": _ratios(found["published"], found["floor"]),
        "differences": differences,
    }


def _ratios(theirs: Mapping[str, float], ours: Mapping[str, float]) -> dict[str, float]:
    """How many times as long the published way takes."""
    steps = {
        "first adapter": ("head_mapping", "once", "transform"),
        "head mapping and transform": ("head_mapping", "transform"),
        "each after": ("transform",),
    }
    return {name: sum(theirs[s] for s in parts) / sum(ours[s] for s in parts) for name, parts in steps.items()}


def _moved(
    adapter: Adapter,
    old: Checkpoint,
    new: Checkpoint,
    heads: Mapping[int, int],
    transfer: TransferMatrix,
    factors: Mapping[Role, Tensor],
) -> Migrated:
    """The adapter moved by equation 3 as this project does it."""
    return migrate(
        adapter, old, new, method="lorasuite", layers={0: 0}, heads={0: heads}, transfer=transfer,
        mlp_factor=lambda _, role: factors[role], rank=RANK,
    )  # fmt: skip


def _pass_over(clock: Clock, old: Checkpoint, new: Checkpoint, roles: Sequence[Role]) -> None:
    """One pass over the weights that each step reads, as they are stored: reading looks for NaN, which is one."""
    mlp = tuple(role for role in MLP if role in roles)
    reads: dict[str, list[tuple[Checkpoint, tuple[Role, ...]]]] = {
        "head_mapping": [(old, ATTENTION), (new, ATTENTION)], "once": [(old, mlp)],
        "transform": [(old, tuple(roles)), (new, tuple(roles))],
    }  # fmt: skip
    for step, weights in reads.items():
        for base, of in weights:
            clock(step, partial(base.layer, 0, of, as_stored=True))


def _operations(configs: Sequence[Mapping[str, Any]], roles: Sequence[Role]) -> dict[str, float]:
    """What is left of each step for one layer pair, by the cost model's count; every weight times ``r`` columns."""
    old, new = (shape(cut(config, 1, WORDS)) for config in configs)
    needed = {
        cost.stage: cost.ops.single for cost in pair_costs(old, new, Work(methods=("lorasuite",), roles=tuple(roles)))
    }
    numbers = sum(s.dims.rows(role) * s.dims.columns(role) for s in (old, new) for role in roles)
    return {
        "head_mapping": needed["head_mapping"], "once": needed["mlp_factors"], "transform": 2 * RANK * numbers
    }  # fmt: skip


def _speed(device: str, size: int = 2048) -> float:
    """Operations a second of a product of two square float32 matrices: the best of five."""
    a, b = torch.randn(2, size, size, device=device)
    taken = []
    for _ in range(5):
        clock = Clock(device)
        clock("product", partial(torch.mm, a, b))
        taken.append(clock.seconds["product"])
    return 2 * size**3 / max(min(taken), 1e-9)


def _random_transfer(d_o: int, d_n: int) -> TransferMatrix:
    """A map of hidden sizes that differ; the identity where they do not."""
    if d_o == d_n:
        return TransferMatrix()
    matrix = torch.randn(d_o, d_n, generator=torch.Generator().manual_seed(9), dtype=torch.float64) / d_n**0.5
    return TransferMatrix(matrix, pseudo_inverse(matrix))


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.cpu().double()).norm() / ours.double().norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    found = json.dumps(measure([published(given.old), published(given.new)], given.device), indent=1)
    print(found)
    if given.keep:
        replace_text(PUBLISHED / f"{given.old}--{given.new}.json", found + "\n")


if __name__ == "__main__":
    main()
