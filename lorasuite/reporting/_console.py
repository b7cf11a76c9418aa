"""What the commands print for people: tables and sentences on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lorasuite.errors import Problem, grouped
from lorasuite.evaluation import Arm, Comparison, EvaluationSummary, TaskSummary
from lorasuite.reporting._files import RECORD, REPORT
from lorasuite.reporting._names import Name, arm_label
from lorasuite.reporting._published import NEW_START, OWN_ROWS_START
from lorasuite.reporting._record import MigrationRecord, PairRecord, StageTiming
from lorasuite.reporting._tables import GENERAL_COLUMNS, Label, comparison, general_costs, task_comparison

#: Stages that give the adapter without fine-tuning: the transforms that were tried, and the choice between them.
#: ``sequential`` is what earlier records call ``model_fit``.
TRANSFORM_STAGES = ("transform", "model_fit", "sequential", "select")
#: Tasks and metrics shown at the end of a migration; the report has all.
TASK_ROWS = 12
#: Notes shown there.
NOTICES = 3
#: Labels of fine-tunes that begin from a new LoRA, by ``finetune.start``.
NEW_LABELS = {NEW_START: "scratch", OWN_ROWS_START: "alone"}


def show_inspection(found: Mapping[str, Any]) -> None:
    """What :func:`lorasuite.planning.inspect` found, as JSON."""
    console = Console()
    console.print(f"{found['old_base']} → {found['new_base']}", highlight=False, soft_wrap=True)
    table = Table("", "old", "new", "", box=SIMPLE_HEAD)
    for row in found["factors"]:
        table.add_row(row["name"], str(row["old"]), str(row["new"]), "changed" if row["changed"] else "")
    if found["factors"]:
        console.print(table)
    words = found["vocabulary"]
    if words:
        text = f"{words['common']} common tokens, {words['renumbered']} under another id"
        examples = ", ".join(f"{e['token']!r} {e['old']}→{e['new']}" for e in words["examples"])
        console.print(text + (f" ({examples} …)" if examples else ""), highlight=False)
    if found["modules"]:
        table = Table("role", "modules", "old name", "new name", "moves", box=SIMPLE_HEAD)
        for row in found["modules"]:
            table.add_row(
                row["role"], str(row["count"]), row["old"], row["new"] or "–", "yes" if row["moves"] else row["why"]
            )
        console.print(table)
    if found["cost"]:
        _show_cost(console, found["cost"])
    for notice in found["notices"]:
        console.print(f"note: {notice}", highlight=False, markup=False)
    for problem in grouped(Problem(**problem) for problem in found["problems"]):
        console.print("[red]problem:[/]", escape(str(problem)), highlight=False)
    if found["outlook"]:
        _show_outlook(console, found["outlook"])
    short = {one["stage"] for one in found["cost"]["shortages"]} if found["cost"] else set()
    if not found["problems"]:
        console.print(
            "no problems found" + (f", but too large for what is free: {', '.join(sorted(short))}" if short else "")
        )
    for side, draft in found["proposal"].items():
        console.print(f"\na first draft of an architecture file for {side.replace('_', ' ')}:", highlight=False)
        console.print(draft["yaml"], highlight=False, markup=False)


def _show_outlook(console: Console, outlook: Mapping[str, Any]) -> None:
    """What every way did elsewhere, and that this is all there is to go by, if it is."""
    table = Table(
        "way", "real cells", "with the miniatures", box=SIMPLE_HEAD, title="measured elsewhere: lead kept, in loss"
    )
    for row in outlook["ways"]:
        table.add_row(row["way"].replace("`", ""), *(_span(row[part]) for part in ("real", "all")))
    console.print(table)
    counted = f"real pairs measured: {outlook['pairs']}, cells: {outlook['cells']}; docs/evidence.md"
    told = "nothing measured predicts what a way does on another pair or task; the ranges are all there is to go by"
    if outlook["predictor"] is not None:
        told = f"what predicts a way's result best, and ahead of the ranges: {outlook['predictor']}"
    console.print(f"{told} ({counted})", highlight=False, markup=False, soft_wrap=True)


def _span(part: Mapping[str, float]) -> str:
    """The lowest and the highest share of some cells, and how many cells it was."""
    ends = dict.fromkeys(f"{part[end]:.0%}" for end in ("low", "high"))
    return f"{' to '.join(ends)} ({part['cells']})"


def _show_cost(console: Console, cost: Mapping[str, Any]) -> None:
    """What every stage needs, beside what there is; stages that need next to nothing are one row."""
    total, machine, gpu = cost["total"], cost["machine"], cost["machine"]["gpu"] is not None
    short = {(one["stage"], part) for one in cost["shortages"] for part in one["what"].split(" and ")}
    small = [row for row in cost["stages"] if row["seconds"] < total["seconds"] / 1000 and not _large(row, total)]
    shown = [row for row in cost["stages"] if row not in small]
    table = Table("stage", "time, about", "RAM", *(["GPU"] if gpu else []), "disk", box=SIMPLE_HEAD, title="cost, here")

    def cells(name: str, row: Mapping[str, Any]) -> list[str]:
        sizes = [("RAM", row["ram_bytes"]), ("GPU memory", row["gpu_bytes"]), ("disk", row["disk_bytes"])]
        marked = [
            _size(n) + (" !" if (name, what) in short else "") for what, n in sizes if gpu or what != "GPU memory"
        ]
        return [name, _duration(row["seconds"]), *marked]

    for row in shown:
        table.add_row(*cells(row["stage"], row))
    if small:
        merged = {key: max(row[key] for row in small) for key in ("ram_bytes", "gpu_bytes")}
        sums = {key: sum(row[key] for row in small) for key in ("seconds", "disk_bytes")}
        table.add_row(*cells("others", merged | sums))
    table.add_section()
    table.add_row(*cells("all", total))
    here = {"seconds": None, **{f"{what}_bytes": machine[f"{what}_free"] or 0 for what in ("ram", "gpu", "disk")}}
    table.add_row("free here", "", *cells("", {**here, "seconds": 0})[2:])
    console.print(table)
    for one in cost["shortages"]:
        what = f"{one['stage']} needs {_size(one['need'])} of {one['what']}, {_size(one['have'])} are free"
        console.print(f"[red]does not fit:[/] {what}: {one['remedy']}", highlight=False, soft_wrap=True)
    speed = cost["measured"]
    text = (
        f"{speed['forward'] / 1e9:.3g} GFLOP/s on {speed['device']}, {speed['read'] / 2**20:.3g} MiB/s read and hashed"
    )
    assumed = f"; assumed: {', '.join(cost['assumed'])}" if cost["assumed"] else ""
    console.print(f"within about a factor of two, nothing cached ({text}){assumed}", highlight=False, soft_wrap=True)


def _large(row: Mapping[str, Any], total: Mapping[str, Any]) -> bool:
    """Whether a stage's memory or disk is a part of the whole worth a row of its own."""
    return any(row[key] > total[key] / 2 for key in ("ram_bytes", "gpu_bytes") if total[key]) or (
        row["disk_bytes"] > total["disk_bytes"] / 20
    )


def _size(size: float) -> str:
    """Bytes to the precision of an estimate."""
    return f"{size / 2**30:.2g} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB" if size >= 2**20 else "–"


def _duration(seconds: float) -> str:
    """A duration to the precision of an estimate."""
    if seconds < 1:
        return "under 1 s"
    unit, size = next((u, s) for u, s in (("h", 3600), ("min", 60), ("s", 1)) if seconds >= 1.5 * s or u == "s")
    return f"{seconds / size:.2g} {unit}" if seconds / size < 100 else f"{seconds / size:.0f} {unit}"


def show_pair(pair: PairRecord) -> None:
    """The layer map and the transfer matrix."""
    console = Console()
    console.print("layer map  " + "  ".join(f"{o}→{n}" for o, n in pair.layer_map.items()), highlight=False)
    fitted = pair.transfer_matrix
    if fitted.identity:
        console.print("transfer matrix: identity")
    else:
        console.print(f"transfer matrix: {fitted.tokens} common tokens, residual {fitted.residual:.3f}")


def show_timings(timings: Sequence[StageTiming]) -> None:
    """The stages of this run, and which were found in the store."""
    table = Table("stage", "seconds", "state")
    for run in timings:
        name = run.stage + (f" ({run.label})" if run.label else "")
        table.add_row(name, f"{run.seconds:.2f}", "Cached" if run.cached else "Completed")
    Console().print(table)


def show_migration(record: MigrationRecord, output: Path, pushed: str | None = None, *, verbose: bool = False) -> None:
    """What a person needs at the end, on one screen: the verdict, one table of scores, and where things are.

    Args:
        pushed: address on the Hub, where it was uploaded.
        verbose: also the pair's maps, the candidates, every stage's seconds, all tables and comparisons.
    """
    if verbose:
        _show_details(record)
    console = Console()
    console.print(f"verdict: {record.verdict.verdict} ({record.reason()})", highlight=False, soft_wrap=True)
    if record.published.transform is not None:  # else the verdict says so
        console.print(f"published: {record.published.headline}", highlight=False, soft_wrap=True)
    if not verbose:
        if record.evaluation:
            _show_scores(record.evaluation, record.label, arm_seconds(record))
        else:
            _show_tasks(record.tasks, record.label, TASK_ROWS)
    if not verbose:
        for notice in record.notices[:NOTICES]:
            console.print(f"note: {notice}", highlight=False, markup=False)
        if len(record.notices) > NOTICES:
            console.print(f"and {len(record.notices) - NOTICES} more notes, in the report", highlight=False)
    console.print(f"written to {output}", highlight=False, soft_wrap=True)
    for what, name in (("report", REPORT), ("record", RECORD)):
        if (output / name).is_file():
            console.print(f"  {what}: {output / name}", highlight=False, soft_wrap=True)
    if pushed:
        console.print(f"pushed to {pushed}", highlight=False, soft_wrap=True)


def _show_details(record: MigrationRecord) -> None:
    """Everything that a migration did and measured."""
    show_pair(record)
    if record.candidates:
        table = Table("candidate", "scale", "held-out loss", title="method auto")
        for entry in record.candidates:
            loss = "diverged" if entry.loss is None else f"{entry.loss:.4f}"
            table.add_row(entry.method, f"{entry.scale:g}", loss)
        Console().print(table)
    show_timings(record.timings)
    _show_scores(record.evaluation, record.label, arm_seconds(record))
    _show_tasks(record.tasks, record.label)
    if costs := general_costs(record.general):
        table = Table("general ability", *GENERAL_COLUMNS, box=SIMPLE_HEAD)
        for row in costs:
            table.add_row(*row)
        Console().print(table)
    _show_comparisons(record.comparisons)
    for notice in record.notices:
        Console().print(f"note: {notice}", highlight=False, markup=False, soft_wrap=True)
    Console().print()


def show_evaluation(results: Mapping[str, Any]) -> None:
    """What the command ``evaluate`` measured, as JSON: scores by arm, tasks by arm, and comparisons."""
    summaries = {arm: EvaluationSummary.model_validate(found) for arm, found in results["results"].items()}
    tasks = {
        arm: {task: TaskSummary.model_validate(score) for task, score in scores.items()}
        for arm, scores in results["tasks"].items()
    }
    _show_scores(summaries, arm_label)
    _show_tasks(tasks, arm_label)
    _show_comparisons([Comparison.model_validate(one) for one in results["comparisons"]])
    for notice in results["notices"]:
        Console().print(f"note: {notice}", highlight=False, markup=False)
    if results["output"] is not None:
        Console().print(f"\nwritten to {results['output']}", highlight=False)


def _show_scores(
    evaluation: Mapping[Name, EvaluationSummary], label: Label, seconds: Mapping[Arm, float] | None = None
) -> None:
    columns, rows = comparison(evaluation, label)
    if not rows:
        return
    table = Table("arm", *columns, "n", *(["seconds"] if seconds else []), box=SIMPLE_HEAD)
    for row in rows:
        spent = None if not seconds else seconds.get(row["arm"])
        time = [] if not seconds else ["–" if spent is None else f"{spent:.2f}"]
        table.add_row(row["name"], *row["cells"], str(row["n"]), *time)
    Console().print(table)


def _show_tasks(tasks: Mapping[Name, Mapping[str, TaskSummary]], label: Label, most: int | None = None) -> None:
    columns, rows = task_comparison(tasks, label)
    if not rows:
        return
    # a row a task and metric: there may be many, and few arms
    table = Table("task", *[row["name"] for row in rows])
    for at, column in enumerate(columns[:most]):
        table.add_row(column, *[row["cells"][at] for row in rows])
    Console().print(table)
    if len(columns) > len(columns[:most]):
        Console().print(f"and {len(columns) - len(columns[:most])} more, in the report", highlight=False)


def _show_comparisons(comparisons: Sequence[Comparison]) -> None:
    if not comparisons:
        return
    table = Table("from → to", "on", "difference, 95 % interval", "p", "lost", "gained", title="sample by sample")
    for one in comparisons:
        counts = ("–", "–", "–")
        if one.mcnemar_p is not None:
            counts = (f"{one.mcnemar_p:.2g}", str(len(one.negative_flips)), str(len(one.positive_flips)))
        interval = "" if one.interval is None else " ({:+.3f} … {:+.3f})".format(*one.interval)
        on = f"{one.task or 'rows'}: {one.metric.split(',')[0]}"
        table.add_row(f"{one.first} → {one.second}", on, f"{one.difference:+.3f}{interval}", *counts)
    Console().print(table)


def arm_seconds(record: MigrationRecord) -> dict[Arm, float]:
    """Seconds of the stages that made each arm's adapter, whenever they were computed.

    For a migrated adapter they are the transforms that were tried and the choice between them; for a fine-tuned one
    its own fine-tune besides, and that alone where it began from a new LoRA; a search with all that it tried. Not
    counted: the pair's stages, which all adapters share, rows that the old adapter wrote, and fine-tunes of starts that
    lost.
    """
    moved = sum(run.computed_seconds for run in record.timings if run.stage in TRANSFORM_STAGES)
    tuned = {run.label: run.computed_seconds for run in record.timings if run.stage == "finetune"}
    found = {
        Arm.MIGRATED: moved,
        Arm.SCRATCH: tuned.get(NEW_LABELS[NEW_START]),
        Arm.SCRATCH_OWN: tuned.get(NEW_LABELS[OWN_ROWS_START]),
    }
    if record.finetune is not None:
        start = record.finetune.start
        # a transform's fine-tune is labelled by its name where several starts are compared
        label = NEW_LABELS.get(start, start if start in tuned else "migrated")
        searched = [run.computed_seconds for run in record.timings if run.stage == "search"]
        if searched:
            found[Arm.MIGRATED_LFT] = sum(searched) + moved
        elif label in tuned:
            found[Arm.MIGRATED_LFT] = tuned[label] + (0.0 if start in NEW_LABELS else moved)
    return {arm: seconds for arm, seconds in found.items() if seconds is not None}


def show_fleet(result: Mapping[str, Any]) -> None:
    """A fleet's verdicts: what the flow ``migrate-fleet`` returns."""
    console = Console()
    table = Table("adapter", "pair", "verdict", "why", "seconds")
    for row in result["adapters"]:
        seconds = "done before" if row["cached"] else f"{row['seconds']:.1f}"
        table.add_row(row["name"], row["pair"], row["verdict"], row["reason"], seconds)
    console.print(table)
    for row in result["adapters"]:
        if row["retry"]:
            console.print(f"try {row['name']} again: {row['retry']}", highlight=False, soft_wrap=True)
    console.print(f"\nreport: {result['report']}", highlight=False, soft_wrap=True)


def show_cells(rows: Sequence[Mapping[str, Any]], counts: Mapping[str, int]) -> None:
    """Every cell of an experiment with its state, and how many are in each state."""
    table = Table("table", "factors", "task", "arm", "seed", "state")
    for row in rows:
        level = ", ".join(f"{name}={value}" for name, value in row["level"].items())
        table.add_row(row["table"], level, row["task"], row["arm"], str(row["seed"]), row["state"])
    console = Console()
    console.print(table)
    console.print(", ".join(f"{count} {state}" for state, count in counts.items()), highlight=False)


def show_experiment(result: Mapping[str, Any]) -> None:
    """An experiment's tables, and what failed: what the flow ``run-experiment`` returns."""
    console = Console()
    for found in result["tables"].values():
        table = Table(*found["columns"], title=found["title"])
        for row in found["rows"]:
            table.add_row(*row)
        console.print(table)
    console.print(f"{result['cells']} cells: {result['computed']} computed, {result['cached']} cached")
    for failure in result["failed"]:
        console.print(f"{failure['cell']}: {failure['reason']}", style="red", markup=False, highlight=False)
    console.print(f"written to {result['output']}", highlight=False)


def show_artifacts(rows: Sequence[Mapping[str, Any]]) -> None:
    """The artifact store's content."""
    table = Table("stage", "key", "MiB", "last used", "state")
    for row in rows:
        size = f"{row['size'] / 2**20:.2f}"
        table.add_row(row["stage"] or "?", row["key"][:16], size, row["last_used"], row["problem"] or "ok")
    Console().print(table)
