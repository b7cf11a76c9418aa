"""What of a migration could be told beforehand: cheap statistics of a pair and a task against what was measured on it.

A *cell* here is a pair and a task, a *way* what can be done there (a transform as it comes, a start fine-tuned on 100
labelled rows, rows that the old adapter writes). How well a way did is the share of the old adapter's lead over the
bare new base that it kept, in loss: ``(bare − way) / (bare − old adapter)``, between −1 and 1. Each cell is predicted
from others: from all but itself, and from those of other pairs alone, which is what a new pair asks for (cells of one
pair have most statistics in common). What has to be beaten is the mean of those others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real import pages
from benchmarks.real.headline import plain
from benchmarks.real.tables import Cell, read, starts
from lorasuite.evaluation import Arm
from lorasuite.transforms import names

HERE = Path(__file__).parent
PAIRS = HERE / "pairs.json"
MINIATURES = HERE.parent / "transfer" / "results" / "cells"
#: What ``lorasuite inspect --calibration`` reads.
OUTLOOK = HERE.parents[1] / "lorasuite" / "planning" / "outlook.json"
BEGIN, END = "<!-- predict -->", "<!-- /predict -->"

#: Rows and epochs of the fine-tunes that are compared, and rows that the old adapter writes.
LABELLED, EPOCHS, WRITTEN = 100, 3, 300
FRESH = f"a fresh LoRA on {LABELLED} labelled rows"
TAUGHT = f"a fresh LoRA on {WRITTEN} rows that the old adapter wrote"
#: The statistics, each known before anything is trained or moved.
FEATURES = {
    "shared": "share of the new vocabulary that the old one has",
    "similarity": "mean similarity of mapped layers",
    "residual": "residual of W_h",
    "teacher": "loss of the old base with its adapter ÷ that of the bare new base, log",
}
#: A way is predicted in a cell where so many others have it.
MIN_OTHERS = 3
RIDGE = 1.0
LEVEL = 0.05


@dataclass(frozen=True)
class Known:
    """A pair and a task: its statistics, NaN where one is not known, and the share of the lead that each way kept."""

    pair: str
    task: str
    real: bool
    features: tuple[float, ...]
    kept: Mapping[str, float]

    @property
    def name(self) -> str:
        """Of the pair and the task."""
        return f"{self.pair}, {self.task}"


def known(cells: Path, miniatures: Path = MINIATURES, pairs: Path = PAIRS) -> list[Known]:
    """Every pair and task that something was measured on, in a fixed order."""
    statistics = json.loads(pairs.read_text(encoding="utf-8")) if pairs.exists() else {}
    return [*_real(read(cells), statistics), *_miniature(miniatures, statistics)]


def _real(cells: Sequence[Cell], statistics: Mapping[str, Any]) -> list[Known]:
    """Of a pair and a task: of each way the best rate by loss, and the mean of that over grids and seeds.

    A grid whose old adapter was not measured is set against that of another grid.
    """
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((f"{cell['old_base']}--{cell['new_base']}", cell["task"]), []).append(cell)
    result = []
    for (pair, task), own in sorted(found.items()):
        levels = _levels(own)
        if len(levels) < 2:
            continue
        kept: dict[str, list[float]] = {}
        for run in sorted({(cell["grid"], cell["seed"]) for cell in own}):
            part = [cell for cell in own if (cell["grid"], cell["seed"]) == run]
            bare, old = ({**levels, **_levels(part)}[arm] for arm in (Arm.NEW, Arm.OLD_ADAPTER))
            for way, bits in _ways(part).items():
                kept.setdefault(way, []).append(_kept(bare, old, bits))
        shares = {way: float(np.mean(values)) for way, values in kept.items()}
        teacher = levels[Arm.OLD_ADAPTER] / levels[Arm.NEW]
        result.append(Known(pair, task, True, _features(statistics.get(pair), teacher), shares))
    return result


def _levels(cells: Sequence[Cell]) -> dict[str, float]:
    """Bits per byte of the two ends of the scale, where they were measured."""
    return {cell["arm"]: cell["bits_per_byte"] for cell in cells if cell["arm"] in (Arm.OLD_ADAPTER, Arm.NEW)}


def _ways(cells: list[Cell]) -> dict[str, float]:
    """Bits per byte of every way of one grid, as the way is by default: cells of other settings are other ways."""
    found = {}
    own = plain(cells)
    few = [cell for cell in own if cell["rows"] in (None, LABELLED) and cell["epochs"] in (None, EPOCHS)]
    for line in starts([cell for cell in few if cell["arm"] != Arm.REFRESHED]):
        method = line.untrained or next(iter(line.tuned.values()), {})
        name = method.get("method")
        if line.untrained is not None:
            found[_moved(name)] = line.untrained["bits_per_byte"]
        if line.best is not None:
            found[FRESH if name is None else _started(name)] = line.best["bits_per_byte"]
    written = [cell for cell in own if cell["arm"] == Arm.REFRESHED and cell["rows"] == WRITTEN]
    if written:
        found[TAUGHT] = min(cell["bits_per_byte"] for cell in written)
    return found


def _miniature(folder: Path, statistics: Mapping[str, Any]) -> list[Known]:
    """The miniature pairs: means over seeds of what benchmarks.transfer measured, in nats."""
    result = []
    for path in sorted(folder.glob("*.json")):
        cells = json.loads(path.read_text(encoding="utf-8"))
        pair, _, task = path.stem.rpartition("-")
        bare, old = cells["bare"]["loss"], cells["old+adapter"]["loss"]
        losses: dict[str, list[float]] = {}
        for name, cell in cells.items():
            way = _miniature_way(name.split("/"))
            if way is not None:
                losses.setdefault(way, []).append(cell["loss"])
        kept = {way: _kept(bare, old, float(np.mean(values))) for way, values in losses.items()}
        result.append(Known(pair, task, False, _features(statistics.get(pair), old / bare), kept))
    return result


def _miniature_way(parts: list[str]) -> str | None:
    """The way of a name: ``lorasuite/0`` (seed), ``scratch/100/3/0`` (rows, epochs, seed), ``refresh/0/3/0``."""
    name, *numbers = parts
    plain = "+" not in name and "-" not in name
    if len(numbers) == 1 and plain:
        return _moved(name)
    if name == "refresh" and numbers[:2] == ["0", str(EPOCHS)]:
        return TAUGHT
    if numbers[:2] == [str(LABELLED), str(EPOCHS)] and plain and name not in ("auto", "default", "refresh"):
        return FRESH if name == "scratch" else None if name in ("eva", "pissa") else _started(name)
    return None


def _moved(method: str) -> str:
    return f"`{method}`, no fine-tune"


def _started(method: str) -> str:
    return f"`{method}`, then {LABELLED} labelled rows"


def _kept(bare: float, old: float, found: float) -> float:
    return float(np.clip((bare - found) / (bare - old), -1, 1))


def _features(pair: Mapping[str, float] | None, teacher: float) -> tuple[float, ...]:
    values = {**(pair or {}), "teacher": float(np.log10(teacher))}
    return tuple(values.get(name, float("nan")) for name in FEATURES)


#: From the features ``(n, f)`` and values ``(n,)`` of other cells and the features ``(f,)`` of this one, its value.
Predictor = Callable[[Any, Any, Any], float]


def mean(_: Any, values: Any, __: Any) -> float:
    """What other cells had on average."""
    return float(values.mean())


def ridge(columns: Sequence[int]) -> Predictor:
    """Ridge regression on standardised features, the intercept not shrunk; an unknown feature counts as the mean."""

    def predict(features: Any, values: Any, own: Any) -> float:
        x, at = _standard(features[:, columns], own[columns])
        centred = values - values.mean()
        weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ centred)
        return float(np.clip(values.mean() + at @ weights, -1, 1))

    return predict


def nearest(features: Any, values: Any, own: Any) -> float:
    """What the cell with the most similar statistics had."""
    x, at = _standard(features, own)
    return float(values[np.linalg.norm(x - at, axis=1).argmin()])


def _standard(features: Any, own: Any) -> tuple[Any, Any]:
    centre = np.nan_to_num(np.nanmean(np.vstack([features, np.zeros_like(own)])[:-1], axis=0))
    filled, at = (np.where(np.isnan(values), centre, values) - centre for values in (features, own))
    spread = filled.std(axis=0)
    spread[spread == 0] = 1.0
    return filled / spread, at / spread


PREDICTORS: dict[str, Predictor] = {
    "mean of the other cells": mean,
    "the nearest cell": nearest,
    "all, ridge": ridge(range(len(FEATURES))),
    **{told: ridge([place]) for place, told in enumerate(FEATURES.values())},
}
BASELINE = next(iter(PREDICTORS))


Errors = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]


def errors(cells: Sequence[Known], whole_pair: bool) -> Errors:
    """For each predictor, by pair and cell, the absolute errors of the ways that enough other cells have.

    Args:
        whole_pair: leave out every cell of the pair, and not the predicted one alone.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in PREDICTORS}
    for cell in cells:
        for way, kept in cell.kept.items():
            apart = [one for one in cells if (one.pair != cell.pair if whole_pair else one.name != cell.name)]
            others = [one for one in apart if way in one.kept]
            if len(others) < MIN_OTHERS:
                continue
            features = np.array([one.features for one in others])
            values = np.array([one.kept[way] for one in others])
            for name, predict in PREDICTORS.items():
                error = abs(predict(features, values, np.array(cell.features)) - kept)
                found[name].setdefault(cell.pair, {}).setdefault(cell.name, []).append(error)
    return found


def mean_error(found: Errors, name: str, among: Sequence[str] | None = None) -> float:
    """The mean over pairs of the mean over cells of the mean over ways; NaN where there is none.

    Args:
        among: the pairs; all if None.
    """
    pairs = [cells for pair, cells in found[name].items() if among is None or pair in among]
    return float(np.mean([_pair_error(cells) for cells in pairs])) if pairs else float("nan")


def _pair_error(cells: Mapping[str, Sequence[float]]) -> float:
    return float(np.mean([np.mean(values) for values in cells.values()]))


def against_mean(found: Errors, name: str) -> tuple[float, float]:
    """How much larger a predictor's error is than the mean's, and the one-sided p-value that it is no smaller.

    Exact, by all changes of sign over pairs, which are what is drawn: cells and ways of a pair are not independent. The
    least value of ``n`` pairs is ``2⁻ⁿ``.
    """
    each = [_pair_error(found[name][pair]) - _pair_error(cells) for pair, cells in found[BASELINE].items()]
    signs = np.array(list(product((1, -1), repeat=len(each))))
    return float(np.mean(each)), float(np.mean(signs @ each <= np.sum(each) + 1e-12))


def best(found: Errors) -> str | None:
    """The predictor of least error of those ahead of the mean by more than chance; None: there is none.

    The level is divided by the number of predictors tried (Bonferroni).

    Args:
        found: of whole pairs left out.
    """
    tried = [name for name in PREDICTORS if name != BASELINE] if found[BASELINE] else []
    ahead = [name for name in tried if against_mean(found, name)[1] < LEVEL / len(tried)]
    return min(ahead, key=lambda name: mean_error(found, name), default=None)


def outlook(cells: Sequence[Known]) -> dict[str, Any]:
    """What ``inspect`` shows: the range of what every way kept that was measured on a real cell, and what predicts it.

    Ranges are of the real cells and of all. Plugins are left out, which its reader does not have.
    """
    real = [cell for cell in cells if cell.real]
    known_names = {_moved(name) for name in names()} | {_started(name) for name in names()} | {FRESH, TAUGHT}
    measured = dict.fromkeys(way for cell in real for way in cell.kept)
    ways = [
        {"way": way, "real": _range(real, way), "all": _range(cells, way)} for way in measured if way in known_names
    ]
    ways.sort(key=lambda row: -row["real"]["mean"])
    pairs = len({cell.pair for cell in real})
    return {"cells": len(real), "pairs": pairs, "predictor": best(errors(cells, True)), "ways": ways}


def _range(cells: Sequence[Known], way: str) -> dict[str, float]:
    kept = [cell.kept[way] for cell in cells if way in cell.kept]
    return {"cells": len(kept), "low": min(kept), "mean": float(np.mean(kept)), "high": max(kept)}


def markdown(cells: Sequence[Known]) -> str:
    """What stands between the marks of the page."""
    by_cell, by_pair, shown = errors(cells, False), errors(cells, True), outlook(cells)
    counted = by_pair[BASELINE]
    if not counted:
        return f"No way was measured in {MIN_OTHERS} cells of other pairs: nothing can be left out and predicted."
    real = sorted({cell.pair for cell in cells if cell.real})
    heads = ["predicted by", "cell left out", "pair left out", "− the mean's", "p", "pair left out, real pairs"]
    rows = [heads, ["---"] * len(heads)]
    for name in PREDICTORS:
        middle, p = against_mean(by_pair, name)
        difference = ["", ""] if name == BASELINE else [f"{middle:+.2f}", f"{p:.2f}"]
        of_cell, of_pair = mean_error(by_cell, name), mean_error(by_pair, name)
        rows.append([name, f"{of_cell:.2f}", f"{of_pair:.2f}", *difference, f"{mean_error(by_pair, name, real):.2f}"])
    sums = (
        sum(len(values) for found in counted.values() for values in found.values()),
        sum(map(len, counted.values())),
    )
    parts = [_told(by_pair, shown["predictor"])]
    parts.append(
        f"Mean errors in shares of the lead, of {sums[0]} outcomes in {sums[1]} cells of {len(counted)} pairs, "
        f"{len(set(real) & set(counted))} of them real; p: sign-flip test over pairs."
    )
    ranges = [["way", "real cells", "kept", "all cells", "kept"], ["---"] * 5]
    for row in shown["ways"]:
        spans = [[str(part["cells"]), span(part)] for part in (row["real"], row["all"])]
        ranges.append([row["way"], *spans[0], *spans[1]])
    head = "What each way kept of the lead, lowest to highest, on real cells and with the miniatures:"
    return "\n\n".join([*parts, pages.table(rows), head, pages.table(ranges)])


def _told(found: Errors, predictor: str | None) -> str:
    """The answer in a sentence or two."""
    if predictor is not None:
        return f"**It is predicted by: {predictor}**, ahead of the mean of other pairs by more than chance."
    pairs, tried = len(found[BASELINE]), [name for name in PREDICTORS if name != BASELINE]
    told = (
        "**Nothing measured predicts it**: no predictor is ahead of the mean of other pairs by more than chance, which "
        f"is p < {LEVEL:g} divided by the {len(tried)} that are tried."
    )
    least = 0.5**pairs
    everywhere = [name for name in tried if against_mean(found, name)[1] <= least]
    if least >= LEVEL / len(tried):
        told += f" {pairs} pairs could not show it (p is {least:.2g} at least)"
        told += f"; ahead in each of them: {', '.join(everywhere)}." if everywhere else "."
    return told


def span(part: Mapping[str, float]) -> str:
    """A range as people read it."""
    ends = [f"{part[end]:.0%}" for end in ("low", "high")]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def write(cells: Path, page: Path, target: Path = OUTLOOK) -> None:
    """Put the tables between the marks of a page, and what ``inspect`` shows into its file."""
    every = known(cells)
    text = page.read_text(encoding="utf-8")
    page.write_text(pages.between(text, BEGIN, END, markdown(every)), encoding="utf-8")
    rounded = json.loads(json.dumps(outlook(every)), parse_float=lambda value: round(float(value), 4))
    target.write_text(json.dumps(rounded, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def describe(name: str, old_base: str, new_base: str, calibration: str, pairs: Path = PAIRS) -> dict[str, float]:
    """Compute a pair's statistics through the ordinary stages, and keep them under its name."""
    from flows.prepare_pair import prepare_pair
    from lorasuite.planning import inspect

    settings = {"calibration_samples": 128, "calibration_cutoff": 64}
    seen = inspect(old_base, new_base)
    seen.raise_problems()
    made = prepare_pair(old_base, new_base, calibration, settings)
    size = next(row["new"] for row in seen.factors if row["name"] == "vocabulary size")
    found = {
        "shared": seen.vocabulary["common"] / size,
        "similarity": float(np.mean(list(made["layer_similarity"].values()))),
        "residual": made["transfer_matrix"]["residual"] or 0.0,
    }
    kept = json.loads(pairs.read_text(encoding="utf-8")) if pairs.exists() else {}
    kept[name] = {feature: round(value, 4) for feature, value in found.items()}
    pairs.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return found
