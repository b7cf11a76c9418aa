"""Parts *layers* and *scales*: which old layer feeds which new one, and how much of an update is added."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from benchmarks.transfer.lab import Lab, Task, Updates, Variant
from benchmarks.zoo import train as trained
from lorasuite.transforms import transform

SCALES = (0.0, 0.5, 1.0, 2.0, 4.0)


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


def layers(task: Task) -> Iterator[Variant]:
    """Layers paired wrongly, or fed by more than one."""
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


def scales(task: Task) -> Iterator[Variant]:
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
