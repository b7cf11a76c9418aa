"""What the transfer benchmark's cells say: tables in Markdown and a figure a pair."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.transfer.arms import ARMS, AUTOMATIC, EPOCHS, METHODS, STARTED, TRANSFORMED, WRITTEN
from benchmarks.transfer.pairs import FURTHER

Row = dict[tuple[str, int, int], dict[int, dict[str, float]]]


def read(output: Path) -> dict[tuple[str, str], Row]:
    """(pair, task) → (arm, rows, epochs) → seed → cell; epochs 0 where nothing is trained."""
    found: dict[tuple[str, str], Row] = {}
    order = ["llama", "neox", FURTHER]
    for file in sorted((output / "cells").glob("*.json"), key=lambda f: (order.index(f.stem.split("-")[0]), f.stem)):
        row: Row = defaultdict(dict)
        for key, value in json.loads(file.read_text()).items():
            match key.split("/"):
                case [arm] | [arm, "0"]:
                    row[arm, 0, 0][0] = value
                case [arm, rows, epochs, seed]:
                    row[arm, int(rows), int(epochs)][int(seed)] = value
        pair, task = file.stem.split("-")
        found[pair, task] = row
    return found


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    if not values:
        return "–"
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def percents(row: Row, arm: str, rows: int, epochs: int) -> list[float]:
    """Exact match in % by seed."""
    return [100 * cell["exact_match"] for _, cell in sorted(row.get((arm, rows, epochs), {}).items())]


def write(output: Path) -> None:
    """Tables in Markdown and a figure a pair."""
    cells = read(output)
    lines = ["## Without fine-tuning and without labels", "", "Exact match in % (loss in nats a token).", ""]
    lines += _header("pair", "task", "bare", *METHODS, "old + adapter", "retrain (10k)")
    for (name, task), row in cells.items():
        shown = []
        for arm in ("bare", *METHODS, "old+adapter", "retrain"):
            found = row.get((arm, 0, 0), {}).get(0)
            shown.append(f"{100 * found['exact_match']:.1f} ({found['loss']:.2f})" if found else "–")
        lines.append(_line(name, task, *shown))
    lines += _unlabelled(cells) + _budgets(cells) + _against_scratch(cells) + _regret(cells) + _regret_of_auto(cells)
    (output / "table.md").write_text("\n".join(lines) + "\n")
    _draw(cells, output)


def _header(*names: str) -> list[str]:
    return [_line(*names), "|---" * len(names) + "|"]


def _line(*values: Any) -> str:
    return "| " + " | ".join(map(str, values)) + " |"


def _unlabelled(cells: dict[tuple[str, str], Row]) -> list[str]:
    """Gap recovered by the refresh without a labelled row."""
    lines = ["", "## Gap recovered without any labelled row, fine-tuned on written ones", "",
             "(arm − bare) / (retrain − bare), by seed.", ""]  # fmt: skip
    lines += _header("pair", "task", "written rows", "start", "epochs", "by seed", "mean")
    for (name, task), row in cells.items():
        for arm, epochs in product((*WRITTEN, "default"), EPOCHS):
            found = percents(row, arm, 0, epochs)
            if found:
                low, high = (100 * row[end, 0, 0][0]["exact_match"] for end in ("bare", "retrain"))
                shares = [(value - low) / (high - low) for value in found]
                by_seed = ", ".join(f"{share:.3f}" for share in shares)
                start = "`auto`" if arm == "default" else STARTED.get(arm, "fresh")
                mean = f"{statistics.mean(shares):.3f}"
                lines.append(_line(name, task, WRITTEN.get(arm, 300), start, epochs, by_seed, mean))
    return lines


def _budgets(cells: dict[tuple[str, str], Row]) -> list[str]:
    lines = []
    for epochs in EPOCHS:
        arms = [arm for arm in ARMS if any(arm == a and e == epochs for row in cells.values() for a, _, e in row)]
        if not arms:
            continue
        lines += ["", f"## Fine-tuned for {epochs} epochs", "",
                  "Exact match in %, learning rate of each arm swept; mean ± standard deviation over seeds.",
                  ""]  # fmt: skip
        lines += _header("pair", "task", "rows", "seeds", *arms)
        for (name, task), row in cells.items():
            for rows in sorted({n for _, n, e in row if e == epochs}):
                values = [percents(row, arm, rows, epochs) for arm in arms]
                counts = sorted({len(v) for v in values if v})
                seeds = "–".join(map(str, {counts[0]: 0, counts[-1]: 0}))
                lines.append(_line(name, task, rows, seeds, *map(spread, values)))
    return lines


def _against_scratch(cells: dict[tuple[str, str], Row]) -> list[str]:
    """Each arm against the fresh LoRA, the same rows and seed in both."""
    lines = ["", "## Against a fresh LoRA on the same rows", "",
             "Cells (task × seed) won / tied within 2 points / lost (mean difference in points).", ""]  # fmt: skip
    lines += _header("rows", "epochs", *(arm for arm in ARMS if arm != "scratch"))
    for rows, epochs in product((10, 30, 100, 300), EPOCHS):
        shown = []
        for arm in ARMS[1:]:
            gains = [
                100 * (cell["exact_match"] - row["scratch", rows, epochs][seed]["exact_match"])
                for row in cells.values()
                for seed, cell in row.get((arm, rows, epochs), {}).items()
                if seed in row.get(("scratch", rows, epochs), {})
            ]
            won, lost = sum(gain > 2 for gain in gains), sum(gain < -2 for gain in gains)
            mean = f" ({statistics.mean(gains):+.0f})" if gains else ""
            shown.append(f"{won}/{len(gains) - won - lost}/{lost}{mean}" if gains else "–")
        if any(value != "–" for value in shown):
            lines.append(_line(rows, epochs, *shown))
    return lines


def _regret(cells: dict[tuple[str, str], Row]) -> list[str]:
    lines = ["", "## Regret of a choice by validation loss", "",
             "The arm with the least loss on the validation rows, as `auto` chooses a start, against the best arm.",
             ""]  # fmt: skip
    lines += _header("pair", "task", "rows", "epochs", "chosen (by seed)", "exact match", "best arm", "regret")
    arms = ("scratch", *TRANSFORMED, "refresh")
    for (name, task), row in cells.items():
        for rows, epochs in sorted({(n, e) for _, n, e in row if n and e}):
            present = [arm for arm in arms if row.get((arm, rows, epochs))]
            seeds = set.intersection(*(set(row[arm, rows, epochs]) for arm in present)) if present else set()
            if not seeds or "scratch" not in present:
                continue
            picked = {
                s: min((finite(row[arm, rows, epochs][s]["validation"]), arm) for arm in present)[1] for s in seeds
            }
            score = {arm: {s: 100 * row[arm, rows, epochs][s]["exact_match"] for s in seeds} for arm in present}
            got = statistics.mean(score[arm][s] for s, arm in picked.items())
            top, best = max((statistics.mean(values.values()), arm) for arm, values in score.items())
            names = ", ".join(picked[s] for s in sorted(seeds))
            lines.append(_line(name, task, rows, epochs, names, f"{got:.1f}", f"{best} {top:.1f}", f"{top - got:.1f}"))
    return lines


def _regret_of_auto(cells: dict[tuple[str, str], Row]) -> list[str]:
    """What the command line publishes against the best arm in hindsight."""
    lines = ["", "## Regret of `auto` itself", "",
             "Exact match of what is published, and points lost against the best single arm of the rows.",
             ""]  # fmt: skip
    lines += _header("pair", "task", "rows", "seed", "arm", "published", "start", "best single arm", "regret")
    for (name, task), row in cells.items():
        for arm, taught in AUTOMATIC.items():
            for (a, rows, epochs), seeds in sorted(row.items()):
                for seed, cell in seeds.items() if a == arm else ():
                    rivals = ("scratch", *TRANSFORMED, *(["refresh", *STARTED] if taught else []))
                    scores = [
                        (100 * row[rival, rows, epochs][seed]["exact_match"], rival)
                        for rival in rivals
                        if seed in row.get((rival, rows, epochs), {})
                    ]
                    if scores:
                        got, (top, best) = 100 * cell["exact_match"], max(scores)
                        shown = f"{got:.1f}", cell["start"], f"{best} {top:.1f}", f"{top - got:.1f}"
                        lines.append(_line(name, task, rows, seed, arm, *shown))
    return lines


def _draw(cells: dict[tuple[str, str], Row], output: Path) -> None:
    """A figure a pair: a row of axes for each number of epochs, a column for each task."""
    budgets = (0, 10, 30, 100, 300, 1000)
    for pair in dict.fromkeys(name for name, _ in cells if name != FURTHER):
        tasks = [task for name, task in cells if name == pair]
        size = (4 * len(tasks), 3 * len(EPOCHS) + 0.6)
        figure = Figure(figsize=size, layout="constrained", dpi=110)
        grid = figure.subplots(len(EPOCHS), len(tasks), squeeze=False, sharex=True, sharey=True)
        for (down, epochs), (across, task) in product(enumerate(EPOCHS), enumerate(tasks)):
            axes, row = grid[down][across], cells[pair, task]
            for arm in ("scratch", *TRANSFORMED, "refresh"):
                points = [(n or 3, percents(row, arm, n, epochs)) for n in budgets]
                points = [(n, values) for n, values in points if values]
                places = [n for n, _ in points]
                axes.plot(places, [statistics.mean(v) for _, v in points], "o-", label=arm)
                axes.fill_between(places, [min(v) for _, v in points], [max(v) for _, v in points], alpha=0.15)
            axes.set(title=f"{task}, {epochs} epoch{'s' * (epochs > 1)}", xscale="log", ylim=(-2, 102))
            axes.set_xticks([n or 3 for n in budgets], [f"{n:,}" for n in budgets])
            axes.minorticks_off()
        figure.supxlabel("labelled rows")
        figure.supylabel("exact match, %")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
        figure.savefig(output / f"{pair}.png")


def finite(loss: float) -> float:
    """A loss that compares: one that is NaN or infinite as the worst."""
    return loss if math.isfinite(loss) else math.inf
