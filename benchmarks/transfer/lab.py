"""What the variants are tried on: a pair of small bases in memory, what both do with texts, and a task on them."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.transfer.pairs import scores
from benchmarks.zoo import train as trained
from lorasuite import zoo
from lorasuite.adapters import Adapter, LowRank, fuse_updates, split_update
from lorasuite.bases import (
    ActivationRecorder,
    Checkpoint,
    LoadedBase,
    Role,
    common_tokens,
    linear_modules,
    text_batches,
)
from lorasuite.correspondence import (
    End,
    MapKind,
    Moments,
    SpaceMap,
    fit_transfer_matrix,
    hidden_states,
    layer_similarity,
    map_heads,
    map_layers,
    mlp_factor,
    space_name,
)
from lorasuite.transforms import LayerPair

Row = dict[str, str]
#: Updates by layer and role, and by module path.
Parts = Mapping[tuple[int, Role], LowRank]
Updates = dict[str, LowRank]
Reading = dict[tuple[Any, ...], Tensor]
#: Its name, its parent's, and what computes its updates.
Variant = tuple[str, str, Callable[[], Updates]]

RANK = 8
GENERAL, TASK, TEST, LABELLED = 512, 320, 500, 32


class Base:
    """A base model in memory, and the checkpoint it came from."""

    def __init__(self, path: Path) -> None:
        self.checkpoint = Checkpoint(path)
        self.model, self.tokenizer = trained.load(path, "cpu")
        self.model.eval()
        self.architecture, self.dims = self.checkpoint.architecture, self.checkpoint.dims
        self.loaded = LoadedBase.of(self.model, self.tokenizer, self.checkpoint)

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
        recorder = ActivationRecorder(self.loaded)
        layers = range(self.dims.layers)
        for layer in layers:
            recorder.block_and_modules(layer)
        with recorder:
            seen = recorder.read(ids, rows)
        found: Reading = {("stream", layer): seen[layer, "block", "in"].float() for layer in layers}
        found["stream", self.dims.layers] = seen[self.dims.layers - 1, "block", "out"].float()
        for layer in layers:
            for module, _ in linear_modules(self.loaded, layer).values():
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
        (whole,) = text_batches(self.texts, old.loaded, new.loaded, 256, size=len(texts))
        self.old, self.new, self.old_rows, self.new_rows = whole.old, whole.new, whole.old_rows, whole.new_rows


class Aligned:
    """Moments of any old layer with any new one, from readings of both, and maps made of them."""

    def __init__(self, old: Reading, new: Reading) -> None:
        self.readings = old, new
        self.squares: dict[Any, Tensor] = {}
        self.found: dict[Any, Moments] = {}

    def _square(self, which: int, key: Any) -> Tensor:
        if (which, key) not in self.squares:
            x = self.readings[which][key].double()
            self.squares[which, key] = x.T @ x
        return self.squares[which, key]

    def moments(self, o: int, n: int, role: Role, end: End) -> Moments:
        shared = {role for _, role, _ in (key for key in self.readings[0] if len(key) == 3)}
        role, end = space_name(role, end, shared).split(".")  # type: ignore[assignment]
        if (o, n, role, end) not in self.found:
            x, y = self.readings[0][o, role, end].double(), self.readings[1][n, role, end].double()
            xx, yy = self._square(0, (o, role, end)), self._square(1, (n, role, end))
            sizes = torch.stack([xx.trace(), yy.trace()])
            widths = x.shape[1], y.shape[1]
            self.found[o, n, role, end] = Moments(len(x), x.sum(0), y.sum(0), x.T @ y, sizes, xx, yy, widths)
        return self.found[o, n, role, end]

    def __call__(self, o: int, n: int, role: Role, end: End, kind: MapKind) -> SpaceMap:
        return SpaceMap(kind.compute(self.moments(o, n, role, end)))

    def reversed(self) -> Aligned:
        return Aligned(self.readings[1], self.readings[0])


class Lab:
    """A pair of bases with a layer map, and general texts read by both."""

    def __init__(self, old: Base, new: Base, texts: Sequence[str], layers: Mapping[int, int] | None = None) -> None:
        self.old, self.new = old, new
        self.general = Texts(texts, old, new)
        self.layers = dict(layers) if layers is not None else self._map()

    def _map(self) -> dict[int, int]:
        states = [hidden_states(base.loaded, self.general.texts) for base in (self.old, self.new)]
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
            matches[o].heads if o in matches else {}, transfer, factors, partial(aligned, o, n),
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
