"""The ``lorasuite`` command line.

Every command takes ``--json`` (one JSON object on standard output and nothing else) and ends with 0, with 1 where the
work failed or a verdict is one that ``--fail-on`` names, or with 2 where the input cannot be used. Progress and logs go
to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from artifacts import ArtifactError, Store
from flows.options import with_settings
from lorasuite.errors import LoRASuiteError, NumericalError
from lorasuite.evaluation import EvaluationSettings
from lorasuite.planning import MigrationConfig, build, read_config
from lorasuite.reporting import PushError

app = typer.Typer(
    name="lorasuite",
    help="Move LoRA adapters to a new base model, and measure what arrives.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
store_app = typer.Typer(help="List, check and clean up the artifact store.", no_args_is_help=True)
app.add_typer(store_app, name="artifacts")


class Limit(StrEnum):
    """Verdicts that a run can be made to fail on."""

    NEEDS_FINETUNE = "needs-finetune"
    RETRAIN = "retrain"


Json = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of settings; flags override it")]
FailOn = Annotated[
    Limit | None,
    typer.Option(
        "--fail-on", help="end with 1 on this verdict or a worse one (unmeasured is worst): needs-finetune or retrain"
    ),
]
PushTo = Annotated[
    str | None,
    typer.Option("--push-to-hub", help="Hub repository to upload adapter and card to, once published here"),
]
Private = Annotated[bool, typer.Option("--private/--public", help="of a Hub repository that is created")]
Refresh = Annotated[list[str] | None, typer.Option("--refresh", help="stage to compute again (repeatable)")]

err = Console(stderr=True)
PAIR_FLAGS = (
    "old_base", "new_base", "calibration", "method", "device", "trust_remote_code", "architectures",
    "calibration_samples", "calibration_cutoff", "pooling", "similarity", "cka_batch", "layer_strategy", "max_offset",
    "head_matching", "transfer_matrix",
)  # fmt: skip


@contextlib.contextmanager
def _errors(as_json: bool) -> Iterator[None]:
    """Turn errors raised on purpose into a message and an exit code; others keep their traceback."""
    try:
        yield
    except (LoRASuiteError, ArtifactError) as error:
        problems = [problem.to_dict() for problem in getattr(error, "problems", [])]
        if as_json:
            _print_json({"error": type(error).__name__, "message": str(error), "problems": problems})
        err.print(f"[bold red]{type(error).__name__}[/]", highlight=False)
        err.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1 if isinstance(error, (NumericalError, PushError)) else 2) from None


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def _merge(config: Path | None, values: dict[str, Any]) -> dict[str, Any]:
    """Settings of a file, overridden by the flags given."""

    def update(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
        nested = {k: update(base.get(k) or {}, v) for k, v in over.items() if isinstance(v, dict)}
        return {**base, **over, **nested}

    return update(read_config(config) if config else {}, values)


def _quiet_libraries() -> None:
    """Keep progress bars and warnings of the libraries out of the way; before they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO")


@app.command()
def inspect(
    old_base: Annotated[str, typer.Option(help="base the adapter was trained on")],
    new_base: Annotated[str, typer.Option(help="base to move it to")],
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter, or several as A:0.7,B:0.3")] = None,
    method: Annotated[str, typer.Option(help="transform that would be used")] = "lorasuite",
    trust_remote_code: Annotated[bool, typer.Option(help="let model repositories run their own code")] = False,
    allow_pickle: Annotated[
        bool, typer.Option(help="read adapter_model.bin, a pickle file, with weights_only")
    ] = False,
    architectures: Annotated[str | None, typer.Option(help="directory of architecture files of your own")] = None,
    as_json: Json = False,
) -> None:
    """Compare two bases and say what of an adapter would move, with every problem at once."""
    from lorasuite import planning

    with _errors(as_json):
        found = planning.inspect(
            old_base,
            new_base,
            adapter,
            method,
            trust_remote_code,
            allow_pickle,
            timed=True,
            architectures=architectures,
        )
        if as_json:
            _print_json(found.to_dict())
        else:
            _show_inspection(found.to_dict())
    if found.problems:
        raise typer.Exit(2)


@app.command()
@with_settings(MigrationConfig, PAIR_FLAGS)
def prepare(values: dict[str, Any], config: ConfigFile = None, refresh: Refresh = None, as_json: Json = False) -> None:
    """Compute, or find, everything about a pair of bases that every adapter shares."""
    with _errors(as_json):
        merged = _merge(config, values)
        # Validated as a migration's settings, which name the two bases in the same way.
        settings = build(MigrationConfig, {"adapter": "none", "output": "none", **merged})
        from flows.prepare_pair import prepare_pair

        result = prepare_pair(
            old_base=settings.old_base,
            new_base=settings.new_base,
            calibration=settings.calibration,
            settings=settings.pair.model_dump(mode="json"),
            method=settings.method,
            device=settings.device,
            refresh=tuple(refresh or ()),
            trust_remote_code=settings.trust_remote_code,
            architectures=settings.architectures,
        )
        if as_json:
            _print_json(result)
        else:
            _show_pair(result)
            _show_timings(result["timings"])


@app.command()
@with_settings(MigrationConfig)
def migrate(
    values: dict[str, Any],
    config: ConfigFile = None,
    fail_on: FailOn = None,
    push_to_hub: PushTo = None,
    private: Private = True,
    refresh: Refresh = None,
    as_json: Json = False,
) -> None:
    """Move one adapter to a new base, and measure it."""
    with _errors(as_json):
        settings = build(MigrationConfig, _merge(config, values))
        from flows.migrate_adapter import migrate_adapter
        from lorasuite.planning import check

        check(settings)  # before a flow run exists: bad input should cost nothing
        if push_to_hub is not None:
            from lorasuite.reporting import check_target, push

            check_target(push_to_hub, settings.new_base)
        result = migrate_adapter(settings.model_dump(mode="json"), refresh=tuple(refresh or ()))
        refused = _refused([result["verdict"]["verdict"]], fail_on)
        if push_to_hub is not None and not refused:
            result["pushed"] = push(Path(result["output"]), push_to_hub, private=private)
        if as_json:
            _print_json(result)
        else:
            _show_migration(result)
    if refused:
        raise typer.Exit(1)


def _refused(verdicts: list[str], limit: Limit | None) -> bool:
    from lorasuite.evaluation import fails

    return limit is not None and any(fails(verdict, limit.value) for verdict in verdicts)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="output directory of a migration")],
    repo: Annotated[str, typer.Argument(help="Hub repository, as owner/name")],
    private: Private = True,
    as_json: Json = False,
) -> None:
    """Upload the adapter and the card of a finished migration to the Hub, as one commit."""
    from lorasuite.bases import read_json
    from lorasuite.reporting import RECORD, check_target
    from lorasuite.reporting import push as upload

    with _errors(as_json):
        check_target(repo, read_json(folder / RECORD)["new_base"]["id"])
        url = upload(folder, repo, private=private)
        _print_json({"pushed": url}) if as_json else Console().print(url)


@app.command()
def fleet(
    file: Annotated[Path, typer.Argument(help="YAML file: pairs of bases, their adapters, settings, gate")],
    only: Annotated[list[str] | None, typer.Option("--only", help="adapter's name (repeatable)")] = None,
    new_base: Annotated[str | None, typer.Option(help="new base in place of the file's")] = None,
    old_base: Annotated[str | None, typer.Option(help="only the pairs with this old base")] = None,
    workers: Annotated[bool, typer.Option("--workers", help="spread over the workers of `lorasuite up`")] = False,
    fail_on: FailOn = None,
    refresh: Refresh = None,
    as_json: Json = False,
) -> None:
    """Migrate what is missing of a fleet of adapters, and print a verdict on each."""
    with _errors(as_json):
        from lorasuite.planning import chosen, read_fleet

        # before a flow run exists: a mistake in the file should cost nothing
        chosen(read_fleet(file, old_base=old_base, new_base=new_base), only or [])
        from flows.migrate_fleet import FleetIncomplete, migrate_fleet

        try:
            result = migrate_fleet(
                str(file.absolute()), new_base, old_base, tuple(only or ()), workers, tuple(refresh or ())
            )
        except FleetIncomplete as error:
            result = error.result
        _print_json(result) if as_json else _show_fleet(result)
    if result["verdicts"].get("failed") or _refused(list(result["verdicts"]), fail_on):
        raise typer.Exit(1)


@app.command()
def experiment(
    file: Annotated[Path, typer.Argument(help="YAML file: a pair of bases, tasks, settings, tables")],
    output: Annotated[Path, typer.Option(help="directory for tables and figures; an earlier run's is gone on with")],
    only: Annotated[list[str] | None, typer.Option("--only", help="table's name (repeatable)")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list every cell, and whether it is cached")] = False,
    refresh: Refresh = None,
    as_json: Json = False,
) -> None:
    """Run what is missing of an experiment's tables, and write them beside the paper's numbers, with figures."""
    with _errors(as_json):
        from flows.run_experiment import plan, run_experiment
        from lorasuite.planning import read_experiment

        # before a flow run exists: a mistake in the file should cost nothing
        checked = read_experiment(file)
        names, stages = tuple(checked.tables(only or [])), tuple(refresh or ())
        if dry_run:
            cells = plan(checked, output, names, stages)
            rows = [{**cell.identity(), "state": cell.state()} for cell in cells]
            counts = Counter(cell.state() for cell in cells)
            if as_json:
                _print_json({"experiment": checked.config.name, "pair": checked.pair_name, "cells": rows, **counts})
            else:
                _show_cells(rows, counts)
            return
        result = run_experiment(str(file.absolute()), str(output), names, stages)
        _print_json(result) if as_json else _show_experiment(result)
    if result["failed"]:
        raise typer.Exit(1)


@app.command()
def up(
    host: Annotated[str, typer.Option(help="address the server listens on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port of the server and its dashboard")] = 4200,
    as_json: Json = False,
) -> None:
    """Start server, work pool, a worker for each GPU (or one for the CPU) and all deployments; Ctrl-C stops them."""
    with _errors(as_json):
        from flows.host import running, stay

        with running(host, port) as started:
            workers = [name for name in started.processes if name != "server"]
            if as_json:
                _print_json({"dashboard": started.dashboard, "api": started.api, "workers": workers})
            else:
                Console().print(f"dashboard  {started.dashboard}\napi        {started.api}", highlight=False)
                Console().print(f"in other terminals: export PREFECT_API_URL={started.api}", highlight=False)
            sys.stdout.flush()
            code = stay(started)
    if code:
        raise typer.Exit(code)


@app.command()
def evaluate(
    base: Annotated[str, typer.Option(help="base model: directory or hub-id[@revision]")],
    adapter: Annotated[list[str] | None, typer.Option(help="PEFT adapter (repeatable)")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="lm-eval tasks, comma-separated; the paper's are lorasuite_math and lorasuite_commonsense"),
    ] = None,
    eval_dir: Annotated[
        Path | None, typer.Option(help="rows of the paper's tasks, as <task>/test.json; the Hub if unset")
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="held-out rows")] = None,
    include_path: Annotated[Path | None, typer.Option(help="directory of lm-eval task files")] = None,
    output: Annotated[Path | None, typer.Option(help="directory to create: results and per-sample outputs")] = None,
    batch_size: Annotated[int | None, typer.Option(help="fixed batch size")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="tokens generated at most for held-out rows; tasks have their own")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="rows evaluated at most, held-out or of a task")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="let model repositories run their own code")] = False,
    refresh: Refresh = None,
    as_json: Json = False,
) -> None:
    """Evaluate a base, bare and with adapters, on held-out rows or lm-eval tasks, in one model load; compare them."""
    with _errors(as_json):
        given = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "limit": limit}
        options = build(EvaluationSettings, {name: value for name, value in given.items() if value is not None})
        names = tuple(t.strip() for t in (tasks or "").split(",") if t.strip())
        from flows.evaluate_adapters import check, evaluate_adapters

        # before a flow run exists: bad input should cost nothing
        check(base, tuple(adapter or ()), eval_data, names, eval_dir, include_path, output, device)
        results = evaluate_adapters(
            base,
            tuple(adapter or ()),
            eval_data,
            names,
            eval_dir,
            include_path,
            options.model_dump(mode="json"),
            device,
            output,
            tuple(refresh or ()),
            trust_remote_code,
        )
        if as_json:
            _print_json(results)
        else:
            _show_evaluation(results["results"])
            _show_tasks(results["tasks"])
            _show_comparisons(results["comparisons"])
            if output is not None:
                Console().print(f"\nwritten to {output}", highlight=False)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="output directory of a migration or of a fleet")],
    as_json: Json = False,
) -> None:
    """Build, or build again, the HTML report of a migration or of a fleet."""
    from lorasuite.reporting import write_report

    with _errors(as_json):
        path = write_report(folder)
        _print_json({"report": str(path)}) if as_json else Console().print(str(path))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="directory to create")] = Path("demo-output"),
    task: Annotated[str | None, typer.Option(help="adapter of the miniature pair")] = None,
    pair: Annotated[str, typer.Option(help="miniature pair: llama or neox")] = "llama",
    samples: Annotated[int, typer.Option(help="labelled rows for the fine-tune", min=0)] = 100,
    written: Annotated[int, typer.Option(help="rows that the old base with the adapter writes besides", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Migrate a real, tiny adapter between two real, tiny bases: no network, under three minutes."""
    with _errors(as_json):
        from flows.demo import run_demo

        result = run_demo(output, pair, task, samples, written)
        if as_json:
            _print_json(result)
        else:
            _show_migration(result)


@store_app.command("ls")
def artifacts_ls(as_json: Json = False) -> None:
    """Every artifact: stage, key, size, when it was made."""
    with _errors(as_json):
        rows = [
            {
                "stage": entry.manifest.stage if entry.manifest else None,
                "key": entry.key,
                "size": entry.size,
                "last_used": entry.last_used.isoformat(timespec="seconds"),
                "problem": entry.problem,
            }
            for entry in Store().ls()
        ]
        if as_json:
            _print_json({"artifacts": rows})
            return
        table = Table("stage", "key", "MiB", "last used", "state")
        for row in rows:
            size = f"{row['size'] / 2**20:.2f}"
            table.add_row(row["stage"] or "?", row["key"][:16], size, row["last_used"], row["problem"] or "ok")
        Console().print(table)


@store_app.command("show")
def artifacts_show(key: Annotated[str, typer.Argument(help="key, or its beginning")], as_json: Json = False) -> None:
    """One artifact's manifest."""
    with _errors(as_json):
        manifest = json.loads(Store().manifest(_full_key(key)).to_json())
        _print_json(manifest) if as_json else Console().print_json(data=manifest)


@store_app.command("verify")
def artifacts_verify(
    key: Annotated[str | None, typer.Argument(help="key, or its beginning; all if left out")] = None,
    as_json: Json = False,
) -> None:
    """Read every byte and compare it with the manifest."""
    store = Store()
    with _errors(as_json):
        keys = [_full_key(key)] if key else [entry.key for entry in store.ls()]
        damaged = {}
        for found in keys:
            try:
                store.verify(found)
            except ArtifactError as error:
                damaged[found] = str(error)
        if as_json:
            _print_json({"checked": len(keys), "damaged": damaged})
        else:
            Console().print(f"{len(keys)} checked, {len(damaged)} damaged")
            for what in damaged.values():
                Console().print(what, style="red", markup=False)
    if damaged:
        raise typer.Exit(1)


@store_app.command("gc")
def artifacts_gc(
    keep_days: Annotated[float, typer.Option(help="days an unused artifact is kept")] = 30,
    delete: Annotated[bool, typer.Option("--delete", help="remove them; without it they are only listed")] = False,
    as_json: Json = False,
) -> None:
    """List, and with --delete remove, artifacts not used for long and leftovers of killed runs."""
    with _errors(as_json):
        found = Store().gc(keep_days=keep_days, dry_run=not delete)
        names = [str(removal.path) for removal in found.removals]
        if as_json:
            _print_json({"removed" if delete else "would_remove": names, "bytes": found.size})
        else:
            Console().print(
                f"{'removed' if delete else 'would remove'} {len(names)} items, {found.size / 2**20:.1f} MiB"
            )


def _full_key(beginning: str) -> str:
    keys = [entry.key for entry in Store().ls() if entry.key.startswith(beginning)]
    if len(keys) != 1:
        from lorasuite.errors import ConfigError, Problem

        what = "no artifact's key begins so" if not keys else f"{len(keys)} artifacts' keys begin so"
        raise ConfigError(Problem(beginning, what, "See `lorasuite artifacts ls`."))
    return keys[0]


def _show_inspection(found: dict[str, Any]) -> None:
    console = Console()
    table = Table("", "old", "new", "", title=f"{found['old_base']} → {found['new_base']}")
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
        table = Table("role", "modules", "old name", "new name", "moves")
        for row in found["modules"]:
            table.add_row(
                row["role"], str(row["count"]), row["old"], row["new"] or "–", "yes" if row["moves"] else row["why"]
            )
        console.print(table)
    if found["memory"]:
        table = Table("stage", "weights held at once, MiB")
        for stage, size in found["memory"].items():
            table.add_row(stage, f"{size / 2**20:.1f}")
        console.print(table)
    if found["time"]:
        table = Table("stage", "time, about")
        for stage, seconds in [*found["time"]["seconds"].items(), ("all", found["time"]["total"])]:
            table.add_row(stage, _duration(seconds))
        console.print(table)
        speed = found["time"]["measured"]
        text = f"{speed['forward'] / 1e9:.3g} GFLOP/s on {speed['device']}, {speed['read'] / 2**20:.3g} MiB/s read"
        console.print(f"times: an order of magnitude, from {found['time']['assumes']} ({text})", highlight=False)
    for notice in found["notices"]:
        console.print(f"note: {notice}", highlight=False)
    for problem in found["problems"]:
        console.print(f"[red]problem:[/] {problem['where']}: {problem['what']}. {problem['remedy']}", highlight=False)
    if not found["problems"]:
        console.print("no problems found")
    for side, draft in found["proposal"].items():
        console.print(f"\na first draft of an architecture file for {side.replace('_', ' ')}:", highlight=False)
        console.print(draft["yaml"], highlight=False, markup=False)


def _duration(seconds: float) -> str:
    """A duration to the precision of an estimate."""
    if seconds < 1:
        return "under 1 s"
    unit, size = next((u, s) for u, s in (("h", 3600), ("min", 60), ("s", 1)) if seconds >= 1.5 * s or u == "s")
    return f"{seconds / size:.2g} {unit}" if seconds / size < 100 else f"{seconds / size:.0f} {unit}"


def _show_pair(result: dict[str, Any]) -> None:
    console = Console()
    console.print("layer map  " + "  ".join(f"{o}→{n}" for o, n in result["layer_map"].items()), highlight=False)
    fitted = result["transfer_matrix"]
    if fitted["identity"]:
        console.print("transfer matrix: identity")
    else:
        console.print(f"transfer matrix: {fitted['tokens']} common tokens, residual {fitted['residual']:.3f}")


def _show_timings(rows: list[dict[str, Any]]) -> None:
    table = Table("stage", "seconds", "state")
    for row in rows:
        name = row["stage"] + (f" ({row['label']})" if row["label"] else "")
        table.add_row(name, f"{row['seconds']:.2f}", "Cached" if row["cached"] else "Completed")
    Console().print(table)


def _show_evaluation(evaluation: dict[str, Any], seconds: dict[str, float] | None = None) -> None:
    from lorasuite.reporting import comparison

    columns, rows = comparison(evaluation)
    if not rows:
        return
    table = Table("arm", *columns, "n", *(["seconds"] if seconds else []))
    for row in rows:
        spent = None if seconds is None else seconds.get(row["arm"])
        time = [] if seconds is None else ["–" if spent is None else f"{spent:.2f}"]
        table.add_row(row["name"], *row["cells"], str(row["n"]), *time)
    Console().print(table)


def _show_migration(result: dict[str, Any]) -> None:
    _show_pair(result)
    if result["candidates"]:
        table = Table("candidate", "scale", "held-out loss", title="method auto")
        for entry in result["candidates"]:
            loss = "diverged" if entry["loss"] is None else f"{entry['loss']:.4f}"
            table.add_row(entry["method"], f"{entry['scale']:g}", loss)
        Console().print(table)
    _show_timings(result["timings"])
    _show_evaluation(result["evaluation"], arm_seconds(result))
    _show_tasks(result["tasks"])
    _show_comparisons(result.get("comparisons", []))
    judged = result["verdict"]
    Console().print(f"\nverdict: {judged['verdict']} ({judged['reason']})", highlight=False, soft_wrap=True)
    Console().print(f"written to {result['output']}", highlight=False)
    if result.get("pushed"):
        Console().print(f"pushed to {result['pushed']}", highlight=False, soft_wrap=True)


def _show_tasks(tasks: dict[str, Any]) -> None:
    from lorasuite.reporting import task_comparison

    columns, rows = task_comparison(tasks)
    if not rows:
        return
    # a row a task and metric: there may be many, and few arms
    table = Table("task", *[row["name"] for row in rows])
    for at, column in enumerate(columns):
        table.add_row(column, *[row["cells"][at] for row in rows])
    Console().print(table)


def _show_comparisons(comparisons: list[dict[str, Any]]) -> None:
    if not comparisons:
        return
    table = Table("from → to", "on", "difference, 95 % interval", "p", "lost", "gained", title="sample by sample")
    for row in comparisons:
        counts = ("–", "–", "–")
        if row["mcnemar_p"] is not None:
            flips = (str(len(row["negative_flips"])), str(len(row["positive_flips"])))
            counts = (f"{row['mcnemar_p']:.2g}", *flips)
        interval = "" if row["interval"] is None else " ({:+.3f} … {:+.3f})".format(*row["interval"])
        on = f"{row['task'] or 'rows'}: {row['metric'].split(',')[0]}"
        table.add_row(f"{row['first']} → {row['second']}", on, f"{row['difference']:+.3f}{interval}", *counts)
    Console().print(table)


def _show_fleet(result: dict[str, Any]) -> None:
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


def _show_cells(rows: list[dict[str, Any]], counts: Mapping[str, int]) -> None:
    table = Table("table", "factors", "task", "arm", "seed", "state")
    for row in rows:
        level = ", ".join(f"{name}={value}" for name, value in row["level"].items())
        table.add_row(row["table"], level, row["task"], row["arm"], str(row["seed"]), row["state"])
    console = Console()
    console.print(table)
    console.print(", ".join(f"{count} {state}" for state, count in counts.items()), highlight=False)


def _show_experiment(result: dict[str, Any]) -> None:
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


def arm_seconds(result: dict[str, Any]) -> dict[str, float]:
    """What each arm's adapter cost to make: for a migrated one its transform and, where it was tuned, its LFT."""
    spent = {(row["stage"], row["label"]): row["computed_seconds"] for row in result["timings"]}
    moved = sum(seconds for (stage, _), seconds in spent.items() if stage in ("transform", "select"))
    return {
        "migrated": moved,
        "scratch": spent.get(("finetune", "scratch"), 0.0),
        "migrated+lft": moved + spent.get(("finetune", "migrated"), 0.0),
    }


def main() -> None:
    """Entry point of the ``lorasuite`` command."""
    _quiet_libraries()
    app()
