"""Variants of the transforms on the miniature pairs, none of them fine-tuned: what they add to their parents.

    python -m benchmarks.transfer.variants --output benchmarks/transfer/results/variants

Everything is done in memory, two small models at a time. Loss and exact match are of 500 test rows; texts of the task
are prompts of the training split with what the old base + adapter answers (greedily); general texts are the 512 of
``run.py``. Parts (``--parts``): *maps* (how a module's spaces are mapped), *layers* (which old layer feeds which new
one), *scales*, *targets* (what is fitted), *round* (old -> new -> old), *sequential*. Cells are kept as they come.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.plugins import FunctionalRidge, register_plugins
from benchmarks.transfer.run import FURTHER, further_base, scores
from benchmarks.zoo import train as trained
from lorasuite import zoo
from lorasuite.adapters import Adapter, LowRank, fuse_updates, split_update
from lorasuite.bases import Checkpoint, Role, common_tokens, text_batches
from lorasuite.bases import _pairing as pairing
from lorasuite.bases import _tracing as blocks
from lorasuite.correspondence import (
    Moments,
    fit_transfer_matrix,
    hidden_states,
    layer_similarity,
    map_heads,
    map_layers,
    mlp_factor,
    reduced_rank,
    ridge,
)
from lorasuite.correspondence import _state_map as state_map
from lorasuite.transforms import Input, LayerPair, transform
from lorasuite.transforms.functional import Functional
from lorasuite.transforms.procrustes import Procrustes, polar

Row = dict[str, str]
#: Updates by layer and role, and by module path.
Parts = Mapping[tuple[int, Role], LowRank]
Updates = dict[str, LowRank]
Reading = dict[tuple[Any, ...], Tensor]

RANK = 8
GENERAL, TASK, TEST, LABELLED = 512, 320, 500, 32
SCALES = (0.0, 0.5, 1.0, 2.0, 4.0)
PARTS = ("maps", "layers", "scales", "targets", "round", "sequential")


# ------------------------------------------------------------------------------------------------- models and readings


class Base:
    """A base model in memory, and the checkpoint it came from."""

    def __init__(self, path: Path) -> None:
        self.checkpoint = Checkpoint(path)
        self.model, self.tokenizer = trained.load(path, "cpu")
        self.model.eval()
        self.architecture, self.dims = self.checkpoint.architecture, self.checkpoint.dims
        self.side = blocks.Side(self.model, self.tokenizer, self.architecture, self.dims)

    def module(self, layer: int, role: Role) -> tuple[Any, Any]:
        found = self.architecture.module(role)
        return found, self.model.get_submodule(self.architecture.path(layer, found))

    @contextlib.contextmanager
    def changed(self, updates: Mapping[str, LowRank], scale: Callable[[str], float] = lambda _: 1.0) -> Iterator[None]:
        """With updates added to its weights."""
        kept = {path: self.model.get_submodule(path).weight.detach().clone() for path in updates}
        try:
            for path, update in updates.items():
                self.model.get_submodule(path).weight.data += scale(path) * update.dense().float()
            yield
        finally:
            for path, weight in kept.items():
                self.model.get_submodule(path).weight.data.copy_(weight)

    def read(self, ids: Tensor, rows: tuple[Tensor, Tensor]) -> Reading:
        """What every role reads and writes, and the stream before each block and after the last, at some positions."""
        watch = blocks.Watch(self.side)
        layers = range(self.dims.layers)
        for layer in layers:
            watch.block(layer)
            for module, linear in blocks.linear_modules(self.side, layer).values():
                watch.module(layer, module, linear)
        with watch.on():
            seen = watch.read(ids, rows)
        found: Reading = {("stream", layer): seen[layer, "block", "in"].float() for layer in layers}
        found["stream", self.dims.layers] = seen[self.dims.layers - 1, "block", "out"].float()
        for layer in layers:
            for module, _ in blocks.linear_modules(self.side, layer).values():
                reads = seen[layer, module.name, "in"].float()
                written = module.split(seen[layer, module.name, "out"].float().T, self.dims)
                for role in module.roles:
                    found[layer, role, "in"], found[layer, role, "out"] = reads, written[role].T
        return found

    def parts(self, updates: Mapping[str, LowRank]) -> dict[tuple[int, Role], LowRank]:
        found = {}
        for path, update in updates.items():
            layer, module = self.architecture.locate(path)  # type: ignore[misc]
            found |= {(layer, role): part for role, part in split_update(update, module, self.dims).items()}
        return found

    def cut(self, parts: Parts, rank: int = RANK) -> Updates:
        """Fused and cut to a rank, as a migration is."""
        found = {}
        for layer in range(self.dims.layers):
            for module in self.architecture.modules:
                own = {role: parts[layer, role] for role in module.roles if (layer, role) in parts}
                if own:
                    path = self.architecture.path(layer, module)
                    found[path] = fuse_updates(own, module, self.dims).compress(rank)[0]
        return found

    def rows(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        return trained.encode(self.tokenizer, rows)


class Texts:
    """Texts in both tokenizations, and the positions that pair."""

    def __init__(self, texts: Sequence[str], old: Base, new: Base) -> None:
        self.texts = list(texts)
        with mock.patch.object(pairing, "BATCH", len(texts)):
            (whole,) = text_batches(self.texts, old.side, new.side, 256)
        self.old, self.new, self.old_rows, self.new_rows = whole.old, whole.new, whole.old_rows, whole.new_rows


def space(role: Role, end: str) -> tuple[Role, str]:
    """One name for a space that several roles read."""
    shared: dict[Role, Role] = {"k": "q", "v": "q", "gate": "up"}
    return (shared.get(role, role), end) if end == "in" else (role, end)


class Aligned:
    """Moments of any old layer with any new one, from readings of both."""

    def __init__(self, old: Reading, new: Reading) -> None:
        self.readings = old, new
        self.squares: dict[Any, Tensor] = {}
        self.found: dict[Any, Moments] = {}

    def _square(self, which: int, key: Any) -> Tensor:
        if (which, key) not in self.squares:
            x = self.readings[which][key].double()
            self.squares[which, key] = x.T @ x
        return self.squares[which, key]

    def __call__(self, o: int, n: int, role: Role, end: str) -> Moments:
        role, end = space(role, end)
        if (o, n, role, end) not in self.found:
            x, y = self.readings[0][o, role, end].double(), self.readings[1][n, role, end].double()
            xx, yy = self._square(0, (o, role, end)), self._square(1, (n, role, end))
            self.found[o, n, role, end] = Moments(x.shape[0], x.sum(0), y.sum(0), xx, x.T @ y, yy)
        return self.found[o, n, role, end]

    def reversed(self) -> Aligned:
        return Aligned(self.readings[1], self.readings[0])


class Lab:
    """A pair of bases with a layer map, and general texts read by both."""

    def __init__(self, old: Base, new: Base, texts: Sequence[str], layers: Mapping[int, int] | None = None) -> None:
        self.old, self.new = old, new
        self.general = Texts(texts, old, new)
        self.layers = dict(layers) if layers is not None else self._map()

    def _map(self) -> dict[int, int]:
        states = [
            hidden_states(base.model, base.tokenizer, base.architecture, self.general.texts)
            for base in (self.old, self.new)
        ]
        return map_layers(layer_similarity(*states))

    @cached_property
    def moments(self) -> Aligned:
        g = self.general
        return Aligned(self.old.read(g.old, g.old_rows), self.new.read(g.new, g.new_rows))

    @cached_property
    def weights(self) -> tuple[Any, dict[int, Any]]:
        """The paper's hidden map and head matches."""
        a, b = self.old, self.new
        common = common_tokens(a.tokenizer, b.tokenizer, a.dims.vocab_size, b.dims.vocab_size)
        found = fit_transfer_matrix(a.checkpoint, b.checkpoint, common)
        return found, map_heads(a.checkpoint, b.checkpoint, self.layers, found)

    def reversed(self) -> Lab:
        back = Lab(self.new, self.old, self.general.texts, {n: o for o, n in self.layers.items()})
        back.__dict__["moments"] = self.moments.reversed()
        return back

    def pair(self, o: int, n: int, moments: Aligned | None = None, needed: tuple[Role, ...] = ()) -> LayerPair:
        aligned = moments or self.moments
        factors = {role: mlp_factor(self.old.checkpoint, o, role) for role in needed if role in ("gate", "up", "down")}
        transfer, matches = self.weights
        return LayerPair(
            self.old.checkpoint.layer(o, needed), self.new.checkpoint.layer(n, needed), self.old.dims, self.new.dims,
            matches[o].heads if o in matches else {}, transfer, factors, lambda role, end: aligned(o, n, role, end),
        )  # fmt: skip

    def moved(
        self,
        parts: Parts,
        make: Callable[[int, int], Any],
        weights: Mapping[tuple[int, int], float] | None = None,
        moments: Aligned | None = None,
    ) -> Updates:
        """Each old layer's updates to the new layers that it feeds, by these weights (1 to its partner)."""
        chosen = weights if weights is not None else dict.fromkeys(self.layers.items(), 1.0)
        found: dict[tuple[int, Role], list[LowRank]] = defaultdict(list)
        for (o, n), weight in chosen.items():
            updates = {r: u for (layer, r), u in parts.items() if layer == o and r in self.new.architecture.roles}
            method = make(o, n)
            if not updates or not weight:
                continue
            pair = self.pair(o, n, moments, tuple(method.weights(tuple(updates))))
            for role, update in method.move(pair, updates).items():
                found[n, role].append(update.scaled(weight))
        return self.new.cut({key: LowRank.sum(u) if len(u) > 1 else u[0] for key, u in found.items()})


class Task:
    """One adapter's task on a pair: its updates, what its teacher writes, and rows to test on."""

    def __init__(self, lab: Lab, words: str, name: str, seed: int) -> None:
        self.lab, self.words, self.seed = lab, words, seed
        self.test = zoo.rows(words, name, "test", TEST)
        self.labelled = zoo.rows(words, name, "train", LABELLED, seed=500 + seed)
        self.name = name
        adapter = Adapter.open(zoo.pair(words).adapter(name))
        self.updates: Updates = {path: adapter.update(path, lab.old.checkpoint) for path in adapter.modules}
        self.parts = lab.old.parts(self.updates)
        self.roles = tuple(adapter.roles(lab.old.architecture))

    def adapted(self) -> Any:
        return self.lab.old.changed(self.updates)

    def written(self, count: int, split: str = "train", shift: int = 0) -> list[Row]:
        """Rows that the old base + adapter writes to unlabelled prompts."""
        prompts = [r["prompt"] for r in zoo.rows(self.words, self.name, split, count, seed=self.seed + shift)]
        old, found = self.lab.old, []
        with self.adapted():
            for start in range(0, len(prompts), 500):
                batch = prompts[start : start + 500]
                read = old.tokenizer(batch, padding=True, return_tensors="pt")
                ids = old.model.generate(**read, max_new_tokens=16, do_sample=False)[:, read["input_ids"].shape[1] :]
                answers = old.tokenizer.batch_decode(ids, skip_special_tokens=True)
                found += [{"prompt": p, "completion": " " + a.strip()} for p, a in zip(batch, answers, strict=True)]
        return found

    @cached_property
    def rows(self) -> list[Row]:
        return self.written(TASK)

    @cached_property
    def held_out(self) -> list[Row]:
        return self.written(LABELLED, shift=900)

    @cached_property
    def texts(self) -> Texts:
        return Texts([row["prompt"] + row["completion"] for row in self.rows], self.lab.old, self.lab.new)

    @cached_property
    def readings(self) -> tuple[Reading, Reading, Reading]:
        """On the teacher's rows: the old base, the old base + adapter, and the new base."""
        t, old, new = self.texts, self.lab.old, self.lab.new
        bare = old.read(t.old, t.old_rows)
        with self.adapted():
            adapted = old.read(t.old, t.old_rows)
        return bare, adapted, new.read(t.new, t.new_rows)

    def score(self, updates: Updates) -> dict[str, float]:
        with self.lab.new.changed(updates):
            return scores(self.lab.new.model, self.lab.new.tokenizer, self.test)


# ------------------------------------------------------------------------------------------------------- maps of spaces


class RidgeOut(Procrustes):
    """Inputs by an orthogonal map, outputs by ridge regression."""

    output_map = FunctionalRidge.output_map


class Shrunk(Functional):
    """The ridge towards zero, as METHOD section 8 has it."""

    def input_map(self, pair: LayerPair, role: Role) -> Tensor:
        reads = pair.moments(role, "in")
        return ridge(reads.yy, reads.xy.T).T


class Strong(Functional):
    """The ridge towards Procrustes a hundred times as strong."""

    def input_map(self, pair: LayerPair, role: Role) -> Tensor:
        reads = pair.moments(role, "in")
        return ridge(reads.yy, reads.xy.T, 0.1, Procrustes.input_map(self, pair, role).T).T


def folded(parent: type[Procrustes], lab: Lab, o: int, n: int) -> Procrustes:
    """The norm's gain is part of the update, and the map is between normalised inputs without it."""

    def gain(base: Base, layer: int, role: Role) -> Tensor:
        norm = "input_layernorm" if role in ("q", "k", "v") else "post_attention_layernorm"
        weight: Tensor = base.side.blocks[layer].get_submodule(norm).weight
        return weight.detach().double()

    class Folded(parent):  # type: ignore[misc, valid-type]
        def input_map(self, pair: LayerPair, role: Role) -> Tensor:
            if role in ("o", "down"):
                return super().input_map(pair, role)
            a, b = gain(lab.old, o, role), gain(lab.new, n, role)
            m = pair.moments(role, "in")
            bare = Moments(
                m.rows, m.x / a, m.y / b, m.xx / torch.outer(a, a), m.xy / torch.outer(a, b), m.yy / torch.outer(b, b)
            )
            inner = LayerPair({}, {}, pair.old_dims, pair.new_dims, {}, pair.transfer, {}, lambda *_: bare)
            return a[:, None] * super().input_map(inner, role) / b

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
        def output_map(self, pair: LayerPair, role: Role) -> Tensor:
            if role not in ("q", "k"):
                return super().output_map(pair, role)
            o, n = pair.old_dims, pair.new_dims
            count_o, count_n = (o.heads, n.heads) if role == "q" else (o.kv_heads, n.kv_heads)
            xx, xy, _ = pair.moments(role, "out").centred()
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


def maps(task: Task) -> Iterator[tuple[str, str, Callable[[], Updates]]]:
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


# ----------------------------------------------------------------------------------------------- layers, scales, target


def by_depth(lab: Lab) -> dict[tuple[int, int], float]:
    """Every new layer is fed by the two old layers around its relative depth; what an old layer gives sums to one."""
    old, new = lab.old.dims.layers, lab.new.dims.layers
    weights: dict[tuple[int, int], float] = defaultdict(float)
    for n in range(new):
        at = n * (old - 1) / max(new - 1, 1)
        low = min(int(at), old - 1)
        weights[low, n] += 1 - (at - low)
        if at > low:
            weights[low + 1, n] += at - low
    return _normalised(weights)


def filled(lab: Lab) -> dict[tuple[int, int], float]:
    """Partners as they are; a new layer without one is fed by its neighbours' partners; sums kept at one."""
    weights: dict[tuple[int, int], float] = defaultdict(float, dict.fromkeys(lab.layers.items(), 1.0))
    partner = {n: o for o, n in lab.layers.items()}
    for n in range(lab.new.dims.layers):
        if n in partner:
            continue
        low, high = (max((m for m in partner if m < n), default=None), min((m for m in partner if m > n), default=None))
        if low is not None and high is not None:
            weights[partner[low], n] += (high - n) / (high - low)
            weights[partner[high], n] += (n - low) / (high - low)
        else:
            weights[partner[low if low is not None else high], n] += 1  # type: ignore[index]
    return _normalised(weights)


def _normalised(weights: Mapping[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    totals: dict[int, float] = defaultdict(float)
    for (o, _), weight in weights.items():
        totals[o] += weight
    return {(o, n): weight / totals[o] for (o, n), weight in weights.items()}


def wrong_layers(lab: Lab) -> dict[tuple[int, int], float]:
    """The layer map upside down."""
    return dict.fromkeys(zip(lab.layers, list(lab.layers.values())[::-1], strict=True), 1.0)


def layers(task: Task) -> Iterator[tuple[str, str, Callable[[], Updates]]]:
    lab = task.lab
    partners = list(lab.layers.values())
    wrong = wrong_layers(lab)
    turned = dict.fromkeys(zip(lab.layers, partners[1:] + partners[:1], strict=True), 1.0)
    for name in ("procrustes", "functional"):
        make = lambda *_, m=transform(name): m  # noqa: E731
        for how, weights in (
            ("wrong layers (reversed)", wrong), ("wrong layers (rotated)", turned),
            ("fed by depth", by_depth(lab)), ("unpartnered layers filled", filled(lab)),
        ):  # fmt: skip
            yield f"{how}, {name}", name, lambda make=make, w=weights: lab.moved(task.parts, make, w)


def scales(task: Task) -> Iterator[tuple[str, str, Callable[[], Updates]]]:
    """One scale for the adapter, and one for each layer (coordinate search, two rounds), on rows the teacher wrote."""
    new = task.lab.new

    def searched(parent: str, per_layer: bool, weights: Mapping[tuple[int, int], float] | None = None) -> Updates:
        updates = task.lab.moved(task.parts, lambda *_: transform(parent), weights)
        of = {path: new.architecture.locate(path)[0] for path in updates}  # type: ignore[index]

        def loss(chosen: Mapping[int, float]) -> float:
            with new.changed(updates, lambda path: chosen[of[path]]):
                return trained.validation_loss(new.model, new.tokenizer, task.held_out)

        places = sorted(set(of.values()))
        best = min((dict.fromkeys(places, s) for s in SCALES), key=loss)
        for n in places * 2 if per_layer else ():
            best = min(({**best, n: s} for s in SCALES), key=loss)
        return {path: update.scaled(best[of[path]]) for path, update in updates.items()}

    wrong = wrong_layers(task.lab)
    yield "one scale, wrong layers (reversed), procrustes", "bare", lambda: searched("procrustes", False, wrong)
    for name in ("procrustes", "functional", "functional-ridge", "random"):
        yield f"one scale, {name}", name, lambda name=name: searched(name, False)
        yield f"one scale a layer, {name}", f"one scale, {name}", lambda name=name: searched(name, True)


def fitted(x: Tensor, wanted: Tensor) -> LowRank:
    x, wanted = x.double(), wanted.double()
    return reduced_rank(x.T @ x, x.T @ wanted, (wanted * wanted).sum(), rank=RANK)[0]


def affine(x: Tensor, y: Tensor) -> Tensor:
    """Ridge map of centred rows."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    return ridge(x.T @ x, x.T @ y)


def residual(task: Task) -> Updates:
    """Output projections fitted to the mapped change of the hidden state, from what they read in the bare new base."""
    lab = task.lab
    known_o, known_n = lab.moments.readings
    bare, adapted, new = task.readings
    parts: dict[tuple[int, Role], LowRank] = {}
    reached: Tensor | float = 0.0
    for o, n in sorted(lab.layers.items(), key=lambda item: item[1]):

        def state(reading: Reading, layer: int, middle: bool) -> Tensor:
            if middle:
                return reading["stream", layer] + reading[layer, "o", "out"]
            return reading["stream", layer + 1]

        for role, middle in (("o", True), ("down", False)):
            carry = affine(state(known_o, o, middle), state(known_n, n, middle))
            change = (state(adapted, o, middle) - state(bare, o, middle)).double() @ carry
            parts[n, role] = fitted(new[n, role, "in"], change - reached)  # type: ignore[index]
            reached = change
    return lab.new.cut(parts)


def proxied(task: Task, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """At paired positions of the teacher's rows: the new base's logits, the change to make, and the ids they are of."""
    lab, t = task.lab, task.texts
    a, b = lab.old, lab.new
    common = common_tokens(a.tokenizer, b.tokenizer, a.dims.vocab_size, b.dims.vocab_size)
    with torch.no_grad():
        before = a.model(input_ids=t.old).logits[t.old_rows]
        with task.adapted():
            after = a.model(input_ids=t.old).logits[t.old_rows]
        own = b.model(input_ids=t.new).logits[t.new_rows]
    change = torch.zeros_like(own)
    change[:, common.new] = alpha * (after - before)[:, common.old]
    return own, change - change.mean(1, keepdim=True), t.new[t.new_rows]


def proxy(task: Task, alpha: float) -> Updates:
    """The last layer's output projections fitted to a change of the final state that makes the proxy's logits."""
    b = task.lab.new
    _, change, _ = proxied(task, alpha)
    head = b.model.get_output_embeddings().weight.detach().double()
    last = b.dims.layers - 1
    final = task.readings[2]["stream", last + 1].double()
    norm = b.model.model.norm if hasattr(b.model, "model") else b.model.gpt_neox.final_layer_norm
    centred = final - final.mean(1, keepdim=True) if hasattr(norm, "bias") else final
    size = (centred.square().mean(1, keepdim=True)).sqrt()
    wanted = ridge(head.T @ head, head.T @ change.double().T, 1e-3).T / norm.weight.detach().double() * size
    updates: Updates = {}
    for role in ("o", "down"):
        module, _ = b.module(last, role)  # type: ignore[arg-type]
        path = b.architecture.path(last, module)
        with b.changed(updates):
            now = b.read(task.texts.new, task.texts.new_rows)
        moved = now["stream", last + 1].double() - final
        updates[path] = fitted(now[last, role, "in"], wanted - moved)
    return updates


def gradients(base: Base, rows: Sequence[Row], offsets: Sequence[Tensor]) -> Reading:
    """Each role's inputs and gradients of the loss by its outputs, at some positions of labelled rows."""
    ids, labels = base.rows(rows)
    kept: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    handles = []

    def keep(key: tuple[int, str], _module: Any, args: Any, output: Tensor) -> None:
        output.retain_grad()
        kept[key] = args[0].detach(), output

    for layer in range(base.dims.layers):
        for module, linear in blocks.linear_modules(base.side, layer).values():
            handles.append(linear.register_forward_hook(partial(keep, (layer, module.name))))
    try:
        predicted = base.model(input_ids=ids).logits[:, :-1].transpose(1, 2)
        torch.nn.functional.cross_entropy(predicted, labels[:, 1:], ignore_index=trained.IGNORED).backward()
    finally:
        for handle in handles:
            handle.remove()
    base.model.zero_grad(set_to_none=True)
    found: Reading = {}
    for layer in range(base.dims.layers):
        for module, _ in blocks.linear_modules(base.side, layer).values():
            reads, output = kept[layer, module.name]
            assert output.grad is not None
            split = module.split(output.grad[tuple(offsets)].double().T, base.dims)
            for role in module.roles:
                found[layer, role, "in"] = reads[tuple(offsets)].double()
                found[layer, role, "out"] = split[role].T
    return found


def gradient(task: Task, how: str) -> Updates:
    """Output maps (or B itself) from one backward pass over 32 labelled rows."""
    lab = task.lab
    # encode() pads on the right with the same words in both tokenizations, so positions pair one to one
    ids, _ = lab.old.rows(task.labelled)
    at = (ids != lab.old.tokenizer.pad_token_id).nonzero(as_tuple=True)
    new = gradients(lab.new, task.labelled, at)
    with task.adapted() if how == "adapted" else contextlib.nullcontext():
        old = gradients(lab.old, task.labelled, at)

    class ByGradient(Procrustes):
        def __init__(self, o: int, n: int) -> None:
            self.layers = o, n

        def output_map(self, pair: LayerPair, role: Role) -> Tensor:
            o, n = self.layers
            return polar(old[o, role, "out"].T @ new[n, role, "out"])

        def move(self, pair: LayerPair, updates: Mapping[Role, LowRank]) -> dict[Role, LowRank]:
            moved = super().move(pair, updates)
            if how != "B":
                return moved
            n = self.layers[1]
            for role, update in moved.items():
                step = LowRank(-new[n, role, "out"].T @ (new[n, role, "in"] @ update.A.T), update.A)
                moved[role] = step.scaled(update.norm() / max(step.norm(), 1e-30))
            return moved

    return lab.moved(task.parts, ByGradient)


def targets(task: Task) -> Iterator[tuple[str, str, Callable[[], Updates]]]:
    yield "residual stream", "functional", lambda: residual(task)
    for alpha in (1.0, 2.0):
        yield f"proxy logits, alpha {alpha:g}", "bare", lambda alpha=alpha: proxy(task, alpha)
    yield (
        "logits",
        "proxy logits, alpha 1",
        lambda: fit_jointly("logits", task.lab, task.adapted, task.rows, task.roles),
    )
    yield "output maps from gradients, old base", "procrustes", lambda: gradient(task, "bare")
    yield "output maps from gradients, old base + adapter", "procrustes", lambda: gradient(task, "adapted")
    yield "B from the new base's gradient", "procrustes", lambda: gradient(task, "B")


def proxy_itself(task: Task, alpha: float) -> dict[str, float]:
    """What the proxy's own logits say: the target of its fit, on the teacher's rows."""
    own, change, ids = proxied(task, alpha)
    which = task.texts.new_rows[0]
    said, wanted = (own + change)[:-1], ids[1:]
    inside = which[1:] == which[:-1]
    starts = {}
    for row, (text, at) in enumerate(zip(which.tolist(), ids.tolist(), strict=True)):
        if at == task.lab.new.tokenizer.convert_tokens_to_ids("="):
            starts[text] = row
    answer = torch.tensor([inside[n] and n >= starts.get(int(which[n]), len(which)) for n in range(len(inside))])
    right = (said.argmax(1) == wanted) | ~answer
    whole = dict.fromkeys(starts, True)
    for n in range(len(inside)):
        whole[int(which[n])] &= bool(right[n])
    loss = torch.nn.functional.cross_entropy(said[answer], wanted[answer])
    return {"exact_match": sum(whole.values()) / len(whole), "loss": float(loss)}


# --------------------------------------------------------------------------------------------------- there and back


def fit_jointly(
    method: str, lab: Lab, adapted: Callable[[], Any], rows: Sequence[Row], roles: Sequence[Role]
) -> Updates:
    states = None
    chosen: Any = transform(method)
    if Input.STATE_MAP in chosen.inputs:
        states = state_map.StateMap.learned(lab.old.side, lab.new.side, roles, lab.general.texts)
    found: Updates = chosen.fit(
        lab.old.side, lab.new.side, adapted, roles, states=states,
        texts=[row["prompt"] + row["completion"] for row in rows], rank=RANK,
    ).updates  # fmt: skip
    return found


def there_and_back(task: Task, method: str) -> dict[str, float]:
    lab = task.lab
    back = lab.reversed()
    if method == "sequential":
        there = fit_jointly("sequential", lab, task.adapted, task.rows, task.roles)
        returned = fit_jointly("sequential", back, lambda: lab.new.changed(there), task.rows, task.roles)
    else:
        there = lab.moved(task.parts, lambda *_: transform(method))
        returned = back.moved(lab.new.parts(there), lambda *_: transform(method))
    error = total = 0.0
    for path, update in task.updates.items():
        size = update.norm() ** 2
        total += size
        got = returned.get(path)
        error += size if got is None else float((got.dense() - update.dense()).square().sum())
    with lab.old.changed(returned):
        return {**scores(lab.old.model, lab.old.tokenizer, task.test), "error": (error / total) ** 0.5}


# -------------------------------------------------------------------------------------------------------- sequential


class Fourier(state_map.Features):
    """With random Fourier features (1,024) beside the linear ones: a map that is not linear in the old state."""

    count = 1024

    def _waves(self, rows: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        width = rows.shape[1]
        w = torch.randn(width, self.count, generator=generator, dtype=rows.dtype) / width**0.5
        return (rows @ w + torch.rand(self.count, generator=generator, dtype=rows.dtype) * 2 * torch.pi).cos()

    def learn(self, rows: Sequence[Tensor]) -> None:
        super().learn(rows)
        waves = torch.cat([self._waves(row) for row in super().standardise(rows)])
        self.wave_mean, self.wave_scale = waves.mean(0), waves.std(0) + 1e-6

    def standardise(self, rows: Sequence[Tensor]) -> list[Tensor]:
        linear = super().standardise(rows)
        return [torch.cat([row, (self._waves(row) - self.wave_mean) / self.wave_scale], 1) for row in linear]


def neighbours(count: int = 8, kept: int = 128) -> Any:
    """A patch of the state maps: the ridge's own error at the nearest general positions is added back."""
    original = state_map._maps
    cache: dict[Any, Any] = {}

    class Near(state_map.Map):
        errors: Tensor
        of: Callable[[Tensor], Tensor]

        def __call__(self, z: Tensor) -> Tensor:
            return super().__call__(z) + self.errors[self.of(z)].mean(1)

    def maps(new: Any, layer: int, ends: Any, known: Any) -> Any:
        reading, inputs, _ = known
        if "basis" not in cache:
            whole = torch.cat(inputs)
            cache["basis"] = torch.linalg.eigh(whole.T @ whole)[1][:, -kept:]
            cache["rows"] = whole @ cache["basis"]

        def of(z: Tensor) -> Tensor:
            if id(z) not in cache:
                cache[id(z)] = torch.cdist(z @ cache["basis"], cache["rows"]).topk(count, largest=False).indices
            found: Tensor = cache[id(z)]
            return found

        found, additive = original(new, layer, ends, known)
        with state_map.watching(new, layer) as watch:
            seen = list(reading.all(watch))
        for key, linear in list(found.items()):
            near = Near(linear.matrix, linear.mean, linear.error)
            errors = torch.cat([at[key] - linear(z) for at, z in zip(seen, inputs, strict=True)])
            object.__setattr__(near, "errors", errors)
            object.__setattr__(near, "of", of)
            found[key] = near
        return found, additive

    return mock.patch.object(state_map, "_maps", maps)


def sequentials(task: Task, more: bool) -> Iterator[tuple[str, str, Callable[[], Updates]]]:
    lab = task.lab
    every = lab.new.architecture.roles

    def run(count: int, roles: Sequence[Role], patch: Callable[[], Any] = contextlib.nullcontext) -> Updates:
        with patch():
            return fit_jointly("sequential", lab, task.adapted, task.written(count), roles)

    yield "sequential", "bare", lambda: run(TASK, task.roles)
    yield "sequential, all projections", "sequential", lambda: run(TASK, every)
    fourier = partial(mock.patch.object, state_map, "Features", Fourier)
    yield "sequential, Fourier features", "sequential", lambda: run(TASK, task.roles, fourier)
    yield "sequential, nearest neighbours", "sequential", lambda: run(TASK, task.roles, neighbours)
    yield "sequential, 1,500 rows", "sequential", lambda: run(1500, task.roles)
    if more:
        yield "sequential, 4,000 rows", "sequential", lambda: run(4000, task.roles)
    yield "sequential, 1,500 rows, all projections", "sequential", lambda: run(1500, every)
    if more:
        yield "sequential, 4,000 rows, all projections", "sequential", lambda: run(4000, every)
    every_near = "sequential, all projections, nearest neighbours"
    yield every_near, "sequential, all projections", lambda: run(TASK, every, neighbours)
    if more:
        yield "sequential, 1,500 rows, all, nearest", every_near, lambda: run(1500, every, neighbours)


# ------------------------------------------------------------------------------------------------------------- cells


def unread(task: Task) -> dict[str, float]:
    """What a guess gets that knows how often each token occurs in the teacher's answers, and reads nothing."""

    def tokens(rows: Sequence[Row]) -> Tensor:
        ids, labels = task.lab.new.rows(rows)
        return ids[labels != trained.IGNORED]

    counts = torch.bincount(tokens(task.rows), minlength=task.lab.new.dims.vocab_size).double() + 0.1
    return {"exact_match": 0.0, "loss": float(-(counts / counts.sum()).log()[tokens(task.test)].mean())}


def run_task(task: Task, name: str, parts: Sequence[str], deep: bool, keep: Callable[[str, str, Any], None]) -> None:
    def cell(variant: str, parent: str, compute: Callable[[], Updates]) -> None:
        keep(variant, parent, lambda: task.score(compute()))

    keep("bare", "", lambda: scores(task.lab.new.model, task.lab.new.tokenizer, task.test))
    if "maps" in parts:
        keep("frequency of answer tokens (reads nothing)", "", lambda: unread(task))
    sources: dict[str, Callable[[Task], Any]] = {"maps": maps, "layers": layers, "scales": scales, "targets": targets}
    for variant in chain.from_iterable(sources[part](task) for part in parts if part in sources):
        cell(*variant)
    if "targets" in parts:
        keep("proxy logits themselves, alpha 1 (no fit)", "bare", lambda: proxy_itself(task, 1.0))
    if "round" in parts and name != FURTHER and task.name in ("mirror", "blend"):
        for method in ("lorasuite", "procrustes", "functional", "functional-ridge", "sequential"):
            keep(f"there and back, {method}", "", lambda method=method: there_and_back(task, method))
    if "sequential" in parts and name != FURTHER:
        for variant in sequentials(task, deep):
            cell(*variant)


def write(cells: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """One table: a variant a row, a task a column, and on how many it beats its parent."""
    seeds = sorted({key.split("/")[3] for key in cells})
    lines = [
        "Exact match in % (loss in nats a token) on 500 test rows, without fine-tuning. *Better*: tasks with a",
        "",
    ]
    lines[0] += " lower loss than the parent's, of those where both were run (without `further`)."
    for seed in seeds:
        found: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
        for key, value in cells.items():
            name, task, variant, own = key.split("/")
            if own == seed:
                found[variant][f"{name} {task}"] = value
        columns = list(dict.fromkeys(column for row in found.values() for column in row))
        lines += ["", f"Seed {seed} (of general texts and of the prompts that the teacher answers).", ""]
        lines += [f"| variant | parent | {' | '.join(columns)} | better |", "|---" * (len(columns) + 3) + "|"]
        for variant, row in found.items():
            if variant.startswith("there"):
                continue
            parent = next(iter(row.values()))["parent"]
            both = [c for c in row if c in found.get(parent, {}) and not c.startswith(FURTHER)]
            won = sum(row[c]["loss"] < found[parent][c]["loss"] - 0.005 for c in both)
            shown = [f"{100 * row[c]['exact_match']:.1f} ({row[c]['loss']:.2f})" if c in row else "–" for c in columns]
            better = f"{won} of {len(both)}" if parent and both else ""
            lines.append(f"| {variant} | {parent} | {' | '.join(shown)} | {better} |")
        back = {variant: row for variant, row in found.items() if variant.startswith("there")}
        if back:
            used = list(dict.fromkeys(column for row in back.values() for column in row))
            lines += ["", "Old -> new -> old: relative error of ΔW, and exact match on the old base.", ""]
            lines += ["| method | " + " | ".join(used) + " |", "|---" * (len(used) + 1) + "|"]
            for variant, row in back.items():
                values = [
                    f"{row[c]['error']:.2f}, {100 * row[c]['exact_match']:.1f}" if c in row else "–" for c in used
                ]
                lines.append(f"| {variant.partition(', ')[2]} | " + " | ".join(values) + " |")
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="cells.json; the table lies beside it as NAME.md")
    parser.add_argument("--pairs", nargs="+", default=["llama", "neox", FURTHER])
    parser.add_argument("--tasks", nargs="+", default=["mirror", "drift", "blend"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--deep", nargs="*", default=["llama/mirror"], help="tasks with 4,000 rows of sequential, too")
    parser.add_argument("--only", nargs="*", default=[], help="variants with one of these in their names")
    parser.add_argument("--further", type=Path, help="folder of the pair further's new base, made where missing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    register_plugins()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    kept = output / "cells.json"
    cells: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for seed in arguments.seeds:
        for name in arguments.pairs:
            words = "llama" if name == FURTHER else name
            pair = zoo.pair(words)
            new = (
                further_base(arguments.further or output.parent / "work/further-base") if name == FURTHER else pair.new
            )
            lab = Lab(Base(pair.old), Base(new), zoo.texts(words, GENERAL, seed))
            for task in arguments.tasks:

                def keep(variant: str, parent: str, compute: Any, name: str = name, task: str = task) -> None:
                    key = f"{name}/{task}/{variant}/{seed}"  # noqa: B023
                    wanted = not arguments.only or any(part in variant for part in arguments.only)
                    if wanted and key not in cells:
                        cells[key] = {"parent": parent, **compute()}
                        part = output / "cells.json.partial"
                        part.write_text(json.dumps(cells, indent=1))
                        part.rename(kept)
                        print(key, cells[key], file=sys.stderr, flush=True)

                deep = f"{name}/{task}" in arguments.deep
                run_task(Task(lab, words, task, seed), name, arguments.parts, deep, keep)
                write(cells, output.parent / f"{output.name}.md")


if __name__ == "__main__":
    main()
