"""The tables of docs/evidence.md and their picture, from the cells."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real import default, pages
from benchmarks.real.grid import TRAINED, prompts_label
from benchmarks.real.headline import GRIDS, WITH, bars, screen
from benchmarks.real.headline import table as headline
from benchmarks.real.scores import EXACT, SCORED_BY, difference, score, slot_f1
from lorasuite.evaluation import Arm, compare

#: Cells of these lines are shown without a learning rate.
BARE = {Arm.OLD: "old base", Arm.OLD_ADAPTER: "old base + adapter", Arm.NEW: "new base, bare"}
#: The control that every start is compared with, and what a start is called.
FRESH = "a fresh LoRA"
NAMES = {
    "lorasuite": "equation 3 (`lorasuite`)",
    "lorasuite-relative": "equation 3, each update at the old ‖ΔW‖/‖W‖",
}
#: Every sweep's learning rates.
RATES = (3e-4, 1e-3, 3e-3)
#: Losses that the picture's axis names.
LEVELS = (0.03, 0.1, 0.3, 1, 3, 10, 30)
MISSING = "not run"
#: What a cell's device is called: seconds and memory of one are nothing beside those of another.
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
#: The picture of the first screen, and that of the sweeps.
PICTURE, SWEEPS = "evidence.png", "evidence-rates.png"
BEGIN, END = "<!-- cells -->", "<!-- /cells -->"
#: Between these stands the table of every pair and task that has a retrain to compare with.
FIRST, LAST = "<!-- headline -->", "<!-- /headline -->"
#: And between these that of the first screens.
SCREEN, UNDER = "<!-- first -->", "<!-- /first -->"
#: Grids that a picture by learning rate shows, and panels in a row of it.
DRAWN = ("all-linear", "paper", "strong")
ACROSS = 3

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Start:
    """One line of a table: what a fine-tune begins with, the rows it reads, and its cells."""

    name: str
    untrained: Cell | None
    tuned: Mapping[float, Cell]

    @property
    def best(self) -> Cell | None:
        """The fine-tune of least loss on the test rows: chosen in hindsight, for each start alike."""
        return min(self.tuned.values(), key=lambda cell: float(cell["loss"]), default=None)


def read(folder: Path) -> list[Cell]:
    """Every cell there is, in a fixed order."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/*.json"))]


def groups(cells: Iterable[Cell]) -> Iterator[tuple[tuple[str, str, str, str], list[Cell]]]:
    """The cells of one pair, task and grid together."""
    found: dict[tuple[str, str, str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell["old_base"], cell["new_base"], cell["task"], cell["grid"]), []).append(cell)
    yield from sorted(found.items())


def starts(cells: list[Cell]) -> list[Start]:
    """The lines of a group, the control first."""
    found = []
    for differs in sorted({differing(cell) for cell in cells if cell["arm"] == Arm.SCRATCH}):
        own = [cell for cell in cells if cell["arm"] == Arm.SCRATCH and differing(cell) == differs]
        found.append(Start(_and(FRESH, differs), None, _by_rate(own)))
    methods = {(cell["method"], differing(cell)) for cell in cells if cell["method"]}
    for method, differs in sorted(methods, key=lambda one: (one[0] not in NAMES, one)):
        own = [cell for cell in cells if (cell["method"], differing(cell)) == (method, differs)]
        moved = [cell for cell in own if cell["arm"] == Arm.MIGRATED]
        tuned = [cell for cell in own if cell["arm"] == Arm.MIGRATED_LFT]
        name = _and(NAMES.get(method, f"`{method}`"), differs)
        found.append(Start(name, moved[0] if moved else None, _by_rate(tuned)))
    written = [cell for cell in cells if cell["arm"] == Arm.REFRESHED]
    for rows, differs in sorted({(cell["rows"], differing(cell)) for cell in written}):
        own = [cell for cell in written if (cell["rows"], differing(cell)) == (rows, differs)]
        name = f"{FRESH}, on {rows} rows that the old adapter wrote, no label"
        found.append(Start(_and(name, differs), None, _by_rate(own)))
    for rows in sorted({cell["rows"] for cell in cells if cell["arm"] == Arm.RETRAINED}):
        own = [cell for cell in cells if cell["arm"] == Arm.RETRAINED and cell["rows"] == rows]
        found.append(Start(f"{FRESH}, retrained on {rows:,} rows", None, _by_rate(own)))
    return found


def _and(name: str, differs: str) -> str:
    return f"{name}; {differs}" if differs else name


def differing(cell: Cell) -> str:
    """What of a cell's settings its table does not otherwise tell."""
    found = [f"`{name}` {value}" for name, value in cell.get("settings", {}).items()]
    return ", ".join([*found, *([f"prompts: {label}"] if (label := prompts_label(cell)) else [])])


def table(cells: list[Cell]) -> str:
    """The Markdown table of a group."""
    lines = starts(cells)
    control = lines[0].best if lines else None
    first = lines[0].name if lines else FRESH
    heads = ["", "no fine-tune", *(f"{rate:g}" for rate in RATES), f"best − best of {first} [95 %]"]
    rows = [heads, ["---"] * len(heads)]
    for arm, name in BARE.items():
        bare = sorted((cell for cell in cells if cell["arm"] == arm), key=lambda cell: float(cell["loss"]))
        rows += [[name, shown(bare[0]), *[""] * (len(RATES) + 1)]] if bare else []
    for line in lines:
        untrained = "" if line.name.startswith(FRESH) else shown(line.untrained)
        tuned = [shown(line.tuned.get(rate)) for rate in RATES]
        rows.append([line.name, untrained, *tuned, "" if line is lines[0] else against(control, line.best)])
    return pages.table(rows)


def shown(cell: Cell | None) -> str:
    """Loss, and the task's score where rows were answered; of slots their F1 as well."""
    if cell is None:
        return MISSING
    scored = score(cell["task"], cell["samples"]) if cell["exact_match"] is not None else None
    slots = slot_f1(cell["samples"]) if scored is not None else None
    parts = [f"{cell['loss']:.2f}", *([] if scored is None else [f"{scored:.0%}"])]
    return ", ".join(parts + ([] if slots is None else [f"F1 {slots:.2f}"]))


def against(control: Cell | None, cell: Cell | None) -> str:
    """How a cell differs from the control on the same rows, in the task's score and in loss, with paired intervals."""
    if control is None or cell is None:
        return ""
    rows = control["samples"], cell["samples"]
    bits = compare(*rows, metric="bits_per_byte")
    found = [_told(bits.difference, bits.interval, 2, "bits/byte")]
    if control["exact_match"] is not None and cell["exact_match"] is not None:  # else losses only
        apart, interval = difference(cell["task"], *rows)
        found.insert(0, _told(100 * apart, interval and (100 * interval[0], 100 * interval[1]), 0, "points"))
    return "; ".join(found)


def _told(value: float, interval: tuple[float, float] | None, digits: int, unit: str) -> str:
    low, high = interval or (0.0, 0.0)
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] {unit}"


def costs(cells: list[Cell]) -> str:
    """The Markdown table of what the cells of a group took: means over the cells of each kind, on each device apart."""
    heads = ["", "on", "cells", "seconds", "of them before the fine-tune", "GiB", "tokens trained on"]
    rows = [heads, ["---"] * len(heads)]
    measured = [cell for cell in cells if cell["peak_memory_bytes"]]
    for arm in (Arm.OLD_ADAPTER, Arm.MIGRATED, Arm.SCRATCH, Arm.MIGRATED_LFT, Arm.REFRESHED, Arm.RETRAINED):
        for device in sorted({cell["device"] for cell in measured if cell["arm"] == arm}):
            own = [cell for cell in measured if (cell["arm"], cell["device"]) == (arm, device)]
            before = [cell["seconds"].get("transform", 0.0) for cell in own]
            tuned = [cell["seconds"].get("finetune", 0.0) for cell in own]
            tokens = [cell["tokens_trained_on"] for cell in own if cell["tokens_trained_on"]]
            rows.append(
                [
                    arm.paper_label,
                    DEVICES[device],
                    str(len(own)),
                    f"{_mean(a + b for a, b in zip(before, tuned, strict=True)):,.0f}",
                    f"{_mean(before):,.1f}",
                    f"{max(cell['peak_memory_bytes'] for cell in own) / 2**30:.1f}",
                    f"{_mean(tokens):,.0f}" if tokens else "",
                ]
            )
    return pages.table(rows) if len(rows) > 2 else ""


def markdown(cells: list[Cell]) -> str:
    """Everything between the marks of the page."""
    parts = []
    for (old, new, task, grid), every in groups(cells):
        own = [cell for cell in every if cell["seed"] == 0]
        lora = own[0]["lora"]
        tuned = [cell for cell in own if cell["rows"] and cell["arm"] not in TRAINED]
        told = f"rank {lora['rank']} on {', '.join(lora['targets'])}; {own[0]['n']} test rows, seed {own[0]['seed']}"
        if tuned:
            told += f"; fine-tunes of {tuned[0]['epochs']:g} epochs on {min(cell['rows'] for cell in tuned)} rows"
        if (dtype := own[0].get("dtype", "auto")) != "auto":
            told += f"; bases in {dtype}"
        told += f". Nats per label token, and {SCORED_BY.get(task, EXACT)}"
        parts += [f"### {old} → {new}, {task}, {grid}", f"{told[0].upper()}{told[1:]}.", table(own), costs(own)]
    return "\n\n".join(part for part in parts if part)


def headlines(cells: list[Cell]) -> str:
    """The table of each pair, task and grid that has a retrain."""
    kept = (cell for cell in cells if cell["grid"] not in WITH or cell.get("prompts"))
    joined = [{**cell, "grid": WITH.get(cell["grid"], cell["grid"])} for cell in kept]
    tables = {key: headline(own) for key, own in groups(joined) if key[-1] in GRIDS}
    shown = ((old, new, grid, one) for (old, new, _, grid), one in tables.items() if one)
    return "\n\n".join(f"**{old} → {new}**, old adapters of `{grid}`\n\n{one}" for old, new, grid, one in shown)


def write(folder: Path, page: Path) -> None:
    """Put the tables between the marks of a page, which is made if there is none, and the pictures beside it."""
    cells = read(folder)
    text = page.read_text(encoding="utf-8") if page.exists() else f"![Loss by rate]({SWEEPS})\n\n{BEGIN}\n{END}\n"
    text = pages.between(text, BEGIN, END, markdown(cells))
    page.write_text(filled(text, cells), encoding="utf-8")
    draw(cells, page.with_name(SWEEPS))
    if SCREEN in text:
        bars(cells, page.with_name(PICTURE))


def filled(text: str, cells: list[Cell]) -> str:
    """A page with the tables that it has marks for, but for that of every cell."""
    if FIRST in text:
        text = pages.between(text, FIRST, LAST, headlines(cells))
    if SCREEN in text:
        text = pages.between(text, SCREEN, UNDER, screen(cells))
    if default.BEGIN in text:
        text = pages.between(text, default.BEGIN, default.END, default.table(default.read()))
    return text


def draw(cells: list[Cell], path: Path) -> None:
    """Loss by learning rate, a panel a group and a line a start; what is not trained is a level."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    first = [cell for cell in cells if cell["seed"] == 0 and not cell.get("settings")]
    found = [group for group in groups(first) if group[0][-1] in DRAWN] or list(groups(first))
    across = min(ACROSS, len(found))
    down = -(-len(found) // across)
    figure = Figure(figsize=(4.8 * across, 4.0 * down + 0.6), layout="constrained", dpi=110)
    panels = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for empty in panels[len(found) :]:
        empty.set_visible(False)
    names = list(dict.fromkeys(_drawn(line) for _, own in found for line in starts(own)))
    colours = dict(zip(names, colormaps["tab20"].colors, strict=False))
    for panel, ((old, new, task, grid), own) in zip(panels, found, strict=False):
        for line in starts(own):
            rates = sorted(line.tuned)
            losses = [line.tuned[rate]["loss"] for rate in rates]
            panel.plot(rates, losses, marker="o", color=colours[_drawn(line)], label=_drawn(line))
            if line.untrained is not None:
                panel.plot(RATES[0] / 2, line.untrained["loss"], marker="x", color=colours[_drawn(line)])
        for arm, style in ((Arm.OLD_ADAPTER, "--"), (Arm.NEW, ":")):
            for cell in (cell for cell in own if cell["arm"] == arm):
                panel.axhline(cell["loss"], color="grey", linestyle=style, linewidth=1, label=BARE[arm])
        panel.set(xscale="log", yscale="log", xlabel="learning rate (×: no fine-tune)", ylabel="nats per label token")
        panel.set_xticks([RATES[0] / 2, *RATES], ["none", *(f"{rate:g}" for rate in RATES)], minor=False)
        panel.set_xticks([], minor=True)
        panel.set_xlim(RATES[0] / 2.6, RATES[-1] * 1.3)
        panel.set_yticks(LEVELS, [f"{level:g}" for level in LEVELS], minor=False)
        panel.set_yticks([], minor=True)
        panel.set_title(f"{old} → {new}\n{task}, {grid}", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    shown_lines = {label: handle for p in panels for handle, label in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(shown_lines.values(), shown_lines, loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, format="png")


def _drawn(line: Start) -> str:
    """What a line is called in the picture: retrains are one, whatever they read."""
    return f"{FRESH}, retrained" if "retrained" in line.name else line.name.replace("`", "")


def _by_rate(cells: Iterable[Cell]) -> dict[float, Cell]:
    return {cell["learning_rate"]: cell for cell in cells}


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
