"""Part *maps*: how a module's spaces are mapped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.plugins.functional_ridge import RIDGE_OUTPUTS
from benchmarks.transfer.lab import Aligned, Base, Lab, Task, Updates, Variant
from lorasuite.bases import Role
from lorasuite.correspondence import ORTHOGONAL, End, MapKind, Moments, SpaceMap, polar, ridge
from lorasuite.transforms import LayerPair, transform
from lorasuite.transforms.functional import Functional
from lorasuite.transforms.procrustes import Procrustes


class RidgeOut(Procrustes):
    """Inputs by an orthogonal map, outputs by ridge regression."""

    maps: Mapping[End, MapKind] = {"in": ORTHOGONAL, "out": RIDGE_OUTPUTS}


class Shrunk(Functional):
    """The ridge towards zero."""

    maps: Mapping[End, MapKind] = {
        "in": MapKind("shrunk", lambda m: ridge(m.yy, m.xy.T).T, frozenset({"yy"})),
        "out": ORTHOGONAL,
    }


class Strong(Functional):
    """The ridge towards Procrustes a hundred times as strong."""

    maps: Mapping[End, MapKind] = {
        "in": MapKind("strong", lambda m: ridge(m.yy, m.xy.T, 0.1, m.orthogonal.T).T, frozenset({"yy"})),
        "out": ORTHOGONAL,
    }


def folded(parent: type[Procrustes], lab: Lab, o: int, n: int) -> Procrustes:
    """The norm's gain is part of the update, and the map is between normalised inputs without it."""

    def gain(base: Base, layer: int, role: Role) -> Tensor:
        norm = "input_layernorm" if role in ("q", "k", "v") else "post_attention_layernorm"
        weight: Tensor = base.loaded.blocks[layer].get_submodule(norm).weight
        return weight.detach().double()

    class Folded(parent):  # type: ignore[misc, valid-type]
        def input_map(self, pair: LayerPair, role: Role) -> SpaceMap:
            if role in ("o", "down"):
                return super().input_map(pair, role)
            a, b = gain(lab.old, o, role), gain(lab.new, n, role)
            plain = parent.maps["in"]

            def compute(m: Moments) -> Tensor:
                xx, yy = m.xx / torch.outer(a, a), m.yy / torch.outer(b, b)
                sizes = torch.stack([xx.trace(), yy.trace()])
                bare = Moments(m.rows, m.x / a, m.y / b, m.xy / torch.outer(a, b), sizes, xx, yy, m.widths)
                return a[:, None] * plain.compute(bare) / b

            return pair.map(role, "in", MapKind("folded", compute, frozenset({"xx", "yy"})))

    return Folded()


def rotary(base: Base) -> tuple[int, Tensor]:
    """Rotating dimensions of a head, and the frequency of each pair of them."""
    config = base.model.config
    given = getattr(config, "rope_parameters", None) or {}
    share = given.get("partial_rotary_factor", getattr(config, "rotary_pct", 1.0))
    theta = given.get("rope_theta", getattr(config, "rope_theta", 10_000.0))
    size = int(base.dims.head_dim * share)
    return size, theta ** (-torch.arange(0, size, 2).double() / size)


def turning(lab: Lab, stretch: bool) -> type[Procrustes]:
    """Query and key outputs only turn inside a rotary pair of a matched head, so that a turn by position commutes."""
    (size_o, freq_o), (size_n, freq_n) = rotary(lab.old), rotary(lab.new)
    nearest = (freq_n.log()[:, None] - freq_o.log()).abs().argmin(1).tolist()

    class Turning(Procrustes):
        def output_map(self, pair: LayerPair, role: Role) -> SpaceMap:
            if role not in ("q", "k"):
                return super().output_map(pair, role)
            return pair.map(role, "out", MapKind("turning", partial(turned, pair, role), frozenset({"xx"})))

    def turned(pair: LayerPair, role: Role, sums: Moments) -> Tensor:
        o, n = pair.old_dims, pair.new_dims
        count_o, count_n = (o.heads, n.heads) if role == "q" else (o.kv_heads, n.kv_heads)
        xx, xy = sums.xx - sums.x.outer(sums.x) / sums.rows, sums.centred()
        found = torch.zeros_like(xy)
        fed: dict[int, set[int]] = defaultdict(set)
        for a, b in pair.heads.items():
            fed[b * count_n // n.heads].add(a * count_o // o.heads)
        for b, sources in fed.items():
            for a in sources:
                for j, i in enumerate(nearest):
                    x = [a * o.head_dim + i, a * o.head_dim + i + size_o // 2]
                    y = [b * n.head_dim + j, b * n.head_dim + j + size_n // 2]
                    c = xy[x][:, y]
                    turn = torch.stack([c[0, 0] + c[1, 1], c[0, 1] - c[1, 0]])
                    length = xx[x, x].sum() if stretch else turn.norm()
                    cos, sin = (turn / length.clamp(min=1e-30)).tolist()
                    block = torch.tensor([[cos, sin], [-sin, cos]], dtype=xy.dtype)
                    found[torch.tensor(x)[:, None], torch.tensor(y)] = block / len(sources)
                still_o = torch.arange(a * o.head_dim + size_o, (a + 1) * o.head_dim)
                still_n = torch.arange(b * n.head_dim + size_n, (b + 1) * n.head_dim)
                if len(still_o) and len(still_n):
                    found[still_o[:, None], still_n] = polar(xy[still_o][:, still_n]) / len(sources)
        return found

    return Turning


def maps(task: Task) -> Iterator[Variant]:
    """``(name, parent, compute)``."""
    lab = task.lab

    def by(make: Callable[[int, int], Any], moments: Callable[[], Aligned] | None = None) -> Callable[[], Updates]:
        return lambda: lab.moved(task.parts, make, moments=moments() if moments else None)

    def on_task() -> Aligned:
        return Aligned(task.readings[0], task.readings[2])

    parents = {
        "copy": "bare", "lorasuite": "bare", "procrustes": "bare", "functional": "procrustes",
        "functional-ridge": "functional", "random": "bare", "target-mean": "bare",
    }  # fmt: skip
    for name, parent in parents.items():
        method = transform(name)
        if not method.problems(lab.old.dims, lab.new.dims, task.roles):
            yield name, parent, by(lambda *_, m=method: m)
    yield "ridge towards zero", "functional", by(lambda *_: Shrunk())
    yield "ridge towards Procrustes, x 100", "functional", by(lambda *_: Strong())
    yield "polar in, ridge out", "procrustes", by(lambda *_: RidgeOut())
    yield "folded gains, procrustes", "procrustes", by(partial(folded, Procrustes, lab))
    yield "folded gains, functional", "functional", by(partial(folded, Functional, lab))
    turn, stretch = turning(lab, False)(), turning(lab, True)()
    yield "rotary pairs turned", "procrustes", by(lambda *_: turn)
    yield "rotary pairs turned and scaled", "procrustes", by(lambda *_: stretch)
    yield "task texts, procrustes", "procrustes", by(lambda *_: Procrustes(), on_task)
    yield "task texts, functional", "functional", by(lambda *_: Functional(), on_task)
