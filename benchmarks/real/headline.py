"""The tables and the picture of first screens: ways to an adapter for the new base, and what each keeps of a retrain's
gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.real import pages
from benchmarks.real.grid import prompts_label
from benchmarks.real.scores import EXACT, SCORED_BY, score
from lorasuite.evaluation import Arm

Cell = Mapping[str, Any]

#: The setting that puts labelled rows beside written ones.
LABELLED = "given.labelled"
#: Grids whose cells are of adapters as people train them, a table each; other grids vary something else.
GRIDS = ("all-linear", "strong")
#: Whose ways stand side by side on the first screens, and the lines there are: of ways by the names of :func:`ways`.
PAIR, GRID = ("smollm2-135m", "gemma3-270m"), "strong"
TASKS = ("banking77", "snips", "e2e")
LINES = {
    "retrained": "a LoRA retrained on all rows",
    "old base + adapter": "old base + adapter",
    "new base, bare": "new base, bare",
    "LoRA on 100 rows": "a fresh LoRA on 100 labelled rows, the best of three rates",
    "equation 3 + LFT on 100 rows": "the paper's equation 3, fine-tuned on those rows, the best of three rates",
    "`lorasuite-relative` + LFT on 100 rows, the best of the others": "the same, each update at its old relative norm",
    "300 rows that the old adapter wrote, no label": "**no label**: 300 rows that the old adapter wrote (16 a step)",
    "1,000 rows that the old adapter wrote, no label": "**no label**: 1,000 such rows",
    "300 written rows and 100 labelled ones": "300 written rows and 100 labelled ones",
}
#: How many of the lines, the first ones, are what the others are set against.
REFERENCES = 3
#: Grids of the same old adapters as another's, and rows and steps: their lines stand in the same table.
WITH = {"discovery": "strong"}


@dataclass(frozen=True)
class Way:
    """A line: cells of every seed there is, of one setting."""

    name: str
    cells: tuple[Cell, ...]

    @property
    def loss(self) -> float:
        """Nats per label token, the mean over seeds."""
        return mean(cell["loss"] for cell in self.cells)

    @property
    def scores(self) -> list[float]:
        """The task's score of each seed; empty where rows were not answered."""
        found = (score(cell["task"], cell["samples"]) for cell in self.cells)
        return [one for one in found if one is not None]


def plain(cells: Iterable[Cell]) -> list[Cell]:
    """Cells of no setting of their own, whose prompts were given."""
    return [cell for cell in cells if not cell.get("settings") and not cell.get("prompts")]


def ways(cells: Sequence[Cell]) -> list[Way]:
    """The ways that cells of one pair, task and grid show, references first.

    Of several learning rates the one with the least loss on the test rows stands, chosen by the first seed: in
    hindsight, for every way alike.
    """
    own = plain(cells)
    longer = [cell for cell in cells if set(cell.get("settings", ())) == {"finetune.epochs"}]
    found = [
        _best("old base + adapter", own, lambda cell: cell["arm"] == Arm.OLD_ADAPTER),
        _best("new base, bare", own, lambda cell: cell["arm"] == Arm.NEW),
    ]
    retrained = sorted({cell["rows"] for cell in own if cell["arm"] == Arm.RETRAINED}, reverse=True)
    for rows in retrained:
        name = f"retrained on {rows:,} rows"
        found.append(_best(name, own, lambda cell, n=rows: cell["arm"] == Arm.RETRAINED and cell["rows"] == n))
    found += [
        _best("LoRA on 100 rows", own, lambda cell: cell["arm"] == Arm.SCRATCH),
        _best("LoRA on 100 rows, 10 epochs", longer, lambda cell: cell["arm"] == Arm.SCRATCH),
    ]
    moved = [cell for cell in own if cell["arm"] == Arm.MIGRATED_LFT]
    found.append(_best("equation 3 + LFT on 100 rows", moved, lambda cell: cell["method"] == "lorasuite"))
    others = [cell for cell in moved if cell["method"] != "lorasuite"]
    if best := _best("", others, lambda cell: True):
        found.append(Way(f"`{best.cells[0]['method']}` + LFT on 100 rows, the best of the others", best.cells))
    written = [cell for cell in cells if cell["arm"] == Arm.REFRESHED]
    for rows in sorted({cell["rows"] for cell in written}):
        alike = [cell for cell in written if cell["rows"] == rows]
        name = f"{rows:,} rows that the old adapter wrote, no label"
        found.append(_best(name, own, lambda cell, n=rows: cell["arm"] == Arm.REFRESHED and cell["rows"] == n))
        beside = [cell for cell in alike if not cell.get("prompts") and set(cell.get("settings", ())) == {LABELLED}]
        for labels in sorted({int(cell["settings"][LABELLED]) for cell in beside}):
            told = f"{rows:,} written rows and {labels:,} labelled ones"
            found.append(_best(told, beside, lambda cell, n=str(labels): cell["settings"][LABELLED] == n))
        for label in sorted({label for cell in alike if (label := prompts_label(cell))}):
            told = f"{rows:,} written rows, prompts from {label}"
            found.append(_best(told, alike, lambda cell, n=label: prompts_label(cell) == n))
    return [way for way in found if way is not None]


def _best(name: str, cells: Iterable[Cell], belongs: Callable[..., bool]) -> Way | None:
    own = [cell for cell in cells if belongs(cell)]
    if not own:
        return None
    first = min(cell["seed"] for cell in own)
    best = min((cell for cell in own if cell["seed"] == first), key=lambda cell: float(cell["loss"]))
    same = ("learning_rate", "method", "epochs", "rows")
    return Way(name, tuple(cell for cell in own if all(cell[key] == best[key] for key in same)))


def table(cells: list[Cell]) -> str:
    """The Markdown table of one pair, task and grid; "" where nothing was retrained to compare with.

    Memory stands where it was measured on the retrain's device.
    """
    lines = ways(cells)
    named = {line.name: line for line in lines}
    bare, whole = named.get("new base, bare"), next((x for x in lines if x.name.startswith("retrained")), None)
    if bare is None or whole is None:
        return ""
    task = whole.cells[0]["task"]
    heads = [
        task,
        "seeds",
        SCORED_BY.get(task, EXACT),
        "of the gap",
        "nats a token",
        "of the gap",
        "tokens trained on",
        "GiB",
    ]
    rows = [heads, ["---"] * len(heads)]
    retrain = whole.cells[0]
    for line in lines:
        cell = line.cells[0]
        tokens = cell["tokens_trained_on"] if line.name != "old base + adapter" else None
        peak = cell["peak_memory_bytes"] if tokens and cell["device"] == retrain["device"] else None
        rows.append(
            [
                line.name,
                str(len(line.cells)),
                _spread(line.scores),
                _share(_mean(bare.scores), _mean(line.scores), _mean(whole.scores)),
                f"{line.loss:.2f}",
                _share(bare.loss, line.loss, whole.loss),
                f"{tokens / retrain['tokens_trained_on']:.1%} of the retrain's" if tokens else "",
                f"{peak / 2**30:.1f}" if peak else "",
            ]
        )
    return pages.table(rows)


def first(cells: list[Cell]) -> dict[str, dict[str, Way]]:
    """The ways of the first screens: by line and task."""
    own = [cell for cell in cells if (cell["old_base"], cell["new_base"], cell["grid"]) == (*PAIR, GRID)]
    by_task = {task: ways([cell for cell in own if cell["task"] == task]) for task in TASKS}
    return {
        line: {task: way for task, found in by_task.items() if (way := _named(found, begin))}
        for begin, line in LINES.items()
    }


def _named(found: Sequence[Way], begin: str) -> Way | None:
    """The first way whose name begins so: of retrains, that on most rows."""
    return next((way for way in found if way.name.startswith(begin)), None)


def screen(cells: list[Cell]) -> str:
    """The Markdown table of the first screens: the mean score, its range over seeds, and nats a token."""
    heads = ["", *(f"{task}, {SCORED_BY.get(task, EXACT)}" for task in TASKS)]
    rows = [heads, ["---"] * len(heads)]
    for line, by_task in first(cells).items():
        rows.append([line, *(_scored(by_task.get(task)) for task in TASKS)])
    return pages.table(rows)


def _scored(way: Way | None) -> str:
    return "not run" if way is None else f"{_spread(way.scores)} ({way.loss:.2f})"


def bars(cells: list[Cell], path: Path) -> None:
    """The scores of the first screens, a panel a task: the mean over seeds, and their range."""
    from matplotlib.figure import Figure

    lines = {line.replace("*", ""): by_task for line, by_task in first(cells).items()}
    figure = Figure(figsize=(13, 3.6), layout="constrained", dpi=110)
    for panel, task in zip(figure.subplots(1, len(TASKS), sharey=True), TASKS, strict=True):
        for place, (line, by_task) in enumerate(lines.items()):
            if (way := by_task.get(task)) is None:
                panel.text(0.01, place, "not run", va="center", color="grey", fontsize=8)
                continue
            middle, low, high = mean(way.scores), min(way.scores), max(way.scores)
            colour = "C1" if "no label" in line else "C0" if place >= REFERENCES else "0.6"
            spread = [[middle - low], [high - middle]] if len(way.scores) > 1 else None
            panel.barh(place, middle, color=colour, xerr=spread, capsize=3)
            panel.text(high + 0.02, place, f"{middle:.1%}", va="center", fontsize=8)
        panel.set(xlim=(0, 1.12), title=f"{task}, {SCORED_BY.get(task, EXACT)}", xticks=[0, 0.5, 1])
        panel.set_yticks(range(len(lines)), list(lines), fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panel.invert_yaxis()
    figure.savefig(path, format="png")


def _mean(values: list[float]) -> float | None:
    return mean(values) if values else None


def _spread(scores: list[float]) -> str:
    if not scores:
        return ""
    text = f"{mean(scores):.1%}"
    return text if len(scores) == 1 else f"{text} [{min(scores):.1%}, {max(scores):.1%}]"


def _share(bare: float | None, value: float | None, whole: float | None) -> str:
    """How much of the way from the bare base to the retrained adapter."""
    if bare is None or value is None or whole is None or bare == whole:
        return ""
    return f"{(value - bare) / (whole - bare) + 0.0:.2f}"  # + 0.0: not -0.00
