"""The table of a first screen: ways to an adapter for the new base, and the share of a retrain's gain each keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.real.grid import prompts_label
from benchmarks.real.scores import EXACT, SCORED_BY, score
from lorasuite.evaluation import Arm

Cell = Mapping[str, Any]

#: The setting that puts labelled rows beside written ones.
LABELLED = "given.labelled"
#: Grids whose cells are of adapters as people train them, a table each; other grids vary something else.
GRIDS = ("all-linear", "strong")
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


def ways(cells: Iterable[Cell]) -> list[Way]:
    """The ways that cells of one pair, task and grid show, references first.

    Of several learning rates the one with the least loss on the test rows stands, chosen by the first seed: in
    hindsight, for every way alike.
    """
    own = [cell for cell in cells if not cell.get("settings") and not cell.get("prompts")]
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
    """The Markdown table of one pair, task and grid; "" where nothing was retrained to compare with."""
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
    for line in lines:
        tokens = line.cells[0]["tokens_trained_on"] if line.name != "old base + adapter" else None
        rows.append(
            [
                line.name,
                str(len(line.cells)),
                _spread(line.scores),
                _share(_mean(bare.scores), _mean(line.scores), _mean(whole.scores)),
                f"{line.loss:.2f}",
                _share(bare.loss, line.loss, whole.loss),
                f"{tokens / whole.cells[0]['tokens_trained_on']:.1%} of the retrain's" if tokens else "",
                f"{peak / 2**30:.1f}" if tokens and (peak := line.cells[0]["peak_memory_bytes"]) else "",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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
