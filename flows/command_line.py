"""The ``lorasuite`` command line.

Every command takes ``--json`` (one JSON object on standard output and nothing else) and ends with 0, with 1 where the
work failed or a verdict is one that ``--fail-on`` names, or with 2 where the input cannot be used. Progress and logs go
to standard error.
"""

from __future__ import annotations

import os
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from artifacts import default_home
from flows.after_commands import Private, export, push, report
from flows.cli_output import RUN, Json, Verbose, debug_option, errors, print_json, progress_line, run_app
from flows.init_command import init
from flows.one_migration import migrated
from flows.options import with_settings
from flows.store_commands import store_app
from flows.up_command import up
from lorasuite import reporting
from lorasuite.bases import LoadSettings
from lorasuite.data import DEFAULT_TEMPLATE, known_templates
from lorasuite.evaluation import EvaluationSettings
from lorasuite.planning import MigrationConfig, build, merged, read_config

app = typer.Typer(
    name="lorasuite",
    help="Move LoRA adapters to a new base model, and measure what arrives.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
#: Headings of commands; those that everyone needs have none.
MANY, AFTER, KEPT = "Many adapters", "Afterwards", "What is kept"
app.command()(init)
for afterwards in (report, push, export):
    app.command(rich_help_panel=AFTER)(afterwards)
app.callback()(debug_option)
app.add_typer(store_app, name="artifacts", rich_help_panel=KEPT)


class Limit(StrEnum):
    """Verdicts that a run can be made to fail on."""

    NEEDS_FINETUNE = "needs-finetune"
    RETRAIN = "retrain"


ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of settings; flags override it")]
FailOn = Annotated[
    Limit | None,
    typer.Option(
        "--fail-on",
        help="end with 1 on this verdict or a worse one (unmeasured is worst): needs-finetune or retrain",
        rich_help_panel=RUN,
    ),
]
PushTo = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        help="Hub repository to upload adapter and card to, once published here",
        rich_help_panel=RUN,
    ),
]
Refresh = Annotated[
    list[str] | None, typer.Option("--refresh", help="stage to compute again (repeatable)", rich_help_panel=RUN)
]

PAIR_FLAGS = (
    "old_base", "new_base", "calibration", "method", "candidates", "device", "trust_remote_code", "architectures",
    "columns", "template", "calibration_samples", "calibration_cutoff", "pooling", "similarity", "cka_batch",
    "layer_strategy", "max_offset", "map_positions", "head_matching", "transfer_matrix",
)  # fmt: skip

#: In place of what ``inspect`` and ``prepare`` can do without: they validate their settings as a migration's.
UNNAMED = {"adapter": "none", "output": "none"}


def _merge(config: Path | None, values: dict[str, Any]) -> dict[str, Any]:
    """Settings of a file, overridden by the flags given."""
    return merged(read_config(config) if config else {}, values)


def _quiet_libraries() -> None:
    """Keep progress bars and warnings of the libraries out of the way; before they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO")


@app.command()
@with_settings(MigrationConfig)
def inspect(values: dict[str, Any], config: ConfigFile = None, as_json: Json = False) -> None:
    """Compare two bases, say what of an adapter would move, with every problem at once, and what it would cost here.

    It takes the flags of ``migrate``: every stage that they would run is shown with its time, memory and disk. Only the
    two bases must be given.
    """
    with errors(as_json):
        merged = _merge(config, values)
        settings = build(MigrationConfig, {**UNNAMED, **merged})
        from lorasuite.planning import survey

        found = survey(settings, default_home(), adapter="adapter" in merged)
        if as_json:
            print_json(found.to_dict())
        else:
            reporting.show_inspection(found.to_dict())
    if found.problems:
        raise typer.Exit(2)


@app.command(rich_help_panel=MANY)
@with_settings(MigrationConfig, PAIR_FLAGS)
def prepare(
    values: dict[str, Any],
    config: ConfigFile = None,
    refresh: Refresh = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Compute, or find, everything about a pair of bases that every adapter shares.

    That is what ``migrate`` reads where it has rows to train on; with ``--candidates all`` what every transform reads.
    """
    with errors(as_json):
        merged = _merge(config, values)
        settings = build(MigrationConfig, {**UNNAMED, **merged})
        from lorasuite.planning import fits

        fits(settings, default_home())  # before a flow run exists
        with progress_line(as_json, verbose):
            from flows.prepare_pair import prepare_pair

            result = prepare_pair(
                old_base=settings.old_base,
                new_base=settings.new_base,
                calibration=settings.calibration,
                settings=settings.pair.model_dump(mode="json"),
                methods=settings.prepared,
                device=settings.device,
                refresh=tuple(refresh or ()),
                trust_remote_code=settings.trust_remote_code,
                architectures=settings.architectures,
                columns=settings.columns,
                template=settings.template,
            )
        if as_json:
            print_json(result)
        else:
            pair = {name: result[name] for name in reporting.PairRecord.model_fields}
            reporting.show_pair(reporting.PairRecord.model_validate(pair))
            reporting.show_timings([reporting.StageTiming.model_validate(run) for run in result["timings"]])


@app.command()
@with_settings(MigrationConfig)
def migrate(
    values: dict[str, Any],
    config: ConfigFile = None,
    fail_on: FailOn = None,
    push_to_hub: PushTo = None,
    private: Private = True,
    refresh: Refresh = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Move one adapter to a new base, and measure it."""
    with errors(as_json):
        settings = build(MigrationConfig, _merge(config, values))
        if push_to_hub is not None:
            reporting.check_target(push_to_hub, settings.new_base)
        result = migrated(settings, tuple(refresh or ()), as_json, verbose)
        refused = _refused([result["verdict"]["verdict"]], fail_on)
        if push_to_hub is not None and not refused:
            result["pushed"] = reporting.push(Path(result["output"]), push_to_hub, private=private)
        if as_json:
            print_json(result)
        else:
            _show_migration(result, verbose)
    if refused:
        raise typer.Exit(1)


def _refused(verdicts: list[str], limit: Limit | None) -> bool:
    from lorasuite.evaluation import fails

    return limit is not None and any(fails(verdict, limit.value) for verdict in verdicts)


@app.command(rich_help_panel=MANY)
def fleet(
    file: Annotated[Path, typer.Argument(help="YAML file: pairs of bases, their adapters, settings, gate")],
    only: Annotated[list[str] | None, typer.Option("--only", help="adapter's name (repeatable)")] = None,
    new_base: Annotated[str | None, typer.Option(help="new base in place of the file's")] = None,
    old_base: Annotated[str | None, typer.Option(help="only the pairs with this old base")] = None,
    workers: Annotated[bool, typer.Option("--workers", help="spread over the workers of `lorasuite up`")] = False,
    fail_on: FailOn = None,
    refresh: Refresh = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Migrate what is missing of a fleet of adapters, and print a verdict on each."""
    with errors(as_json):
        from lorasuite.planning import chosen, read_fleet

        # before a flow run exists: a mistake in the file should cost nothing
        chosen(read_fleet(file, old_base=old_base, new_base=new_base), only or [])
        from flows.migrate_fleet import FleetIncomplete, migrate_fleet

        try:
            with progress_line(as_json, verbose):
                result = migrate_fleet(
                    str(file.absolute()), new_base, old_base, tuple(only or ()), workers, tuple(refresh or ())
                )
        except FleetIncomplete as error:
            result = error.result
        print_json(result) if as_json else reporting.show_fleet(result)
    if result["verdicts"].get("failed") or _refused(list(result["verdicts"]), fail_on):
        raise typer.Exit(1)


@app.command(rich_help_panel=MANY)
def experiment(
    file: Annotated[Path, typer.Argument(help="YAML file: a pair of bases, tasks, settings, tables")],
    output: Annotated[Path, typer.Option(help="directory for tables and figures; an earlier run's is gone on with")],
    only: Annotated[list[str] | None, typer.Option("--only", help="table's name (repeatable)")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list every cell, and whether it is cached")] = False,
    refresh: Refresh = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Run what is missing of an experiment's tables, and write them beside the paper's numbers, with figures."""
    with errors(as_json):
        from lorasuite.planning import read_experiment

        # before a flow run exists: a mistake in the file should cost nothing
        checked = read_experiment(file)
        names, stages = tuple(checked.tables(only or [])), tuple(refresh or ())
        if dry_run:
            from flows.run_experiment import plan

            cells = plan(checked, output, names, stages)
            rows = [{**cell.identity(), "state": cell.state()} for cell in cells]
            counts = Counter(cell.state() for cell in cells)
            if as_json:
                print_json({"experiment": checked.config.name, "pair": checked.pair_name, "cells": rows, **counts})
            else:
                reporting.show_cells(rows, counts)
            return
        with progress_line(as_json, verbose):
            from flows.run_experiment import run_experiment

            result = run_experiment(str(file.absolute()), str(output), names, stages)
        print_json(result) if as_json else reporting.show_experiment(result)
    if result["failed"]:
        raise typer.Exit(1)


app.command(rich_help_panel=MANY)(up)


@app.command()
@with_settings(LoadSettings, heading="Reading models and adapters")
def evaluate(
    values: dict[str, Any],
    base: Annotated[str, typer.Option(help=escape("base model: directory or hub-id[@revision]"))],
    adapter: Annotated[list[str] | None, typer.Option(help="PEFT adapter (repeatable)")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="lm-eval tasks, comma-separated; the paper's are lorasuite_math and lorasuite_commonsense"),
    ] = None,
    eval_dir: Annotated[
        Path | None, typer.Option(help="rows of the paper's tasks, as <task>/test.json; the Hub if unset")
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="held-out rows")] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="fields of rows that the data calls otherwise: prompt=text,completion=label"),
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="directory of lm-eval task files")] = None,
    template: Annotated[
        str, typer.Option(help=f"how instruction rows become prompts: {', '.join(known_templates())}, or a Jinja file")
    ] = DEFAULT_TEMPLATE,
    output: Annotated[Path | None, typer.Option(help="directory to create: results and per-sample outputs")] = None,
    batch_size: Annotated[int | None, typer.Option(help="fixed batch size")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="tokens generated at most for held-out rows; tasks have their own")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="rows evaluated at most, held-out or of a task")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="let model repositories run their own code")] = False,
    refresh: Refresh = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Evaluate a base, bare and with adapters, on held-out rows or lm-eval tasks, in one model load; compare them."""
    with errors(as_json):
        given = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "limit": limit}
        loading = build(LoadSettings, values)
        options = build(EvaluationSettings, {name: value for name, value in given.items() if value is not None})
        names = tuple(t.strip() for t in (tasks or "").split(",") if t.strip())
        pairs = tuple(p.strip() for p in (columns or "").split(",") if p.strip())
        with progress_line(as_json, verbose):
            from flows.evaluate_adapters import check, evaluate_adapters

            # before a flow run exists: bad input should cost nothing
            asked = (base, tuple(adapter or ()), eval_data, names, eval_dir, include_path, output, device, loading)
            check(*asked, trust_remote_code, pairs, template)
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
                loading.model_dump(mode="json"),
                pairs,
                template,
            )
        if as_json:
            print_json(results)
        else:
            reporting.show_evaluation(results)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="directory to create")] = Path("demo-output"),
    task: Annotated[str | None, typer.Option(help="adapter of the miniature pair")] = None,
    pair: Annotated[str, typer.Option(help="miniature pair: llama or neox")] = "llama",
    samples: Annotated[int, typer.Option(help="labelled rows for the fine-tune", min=0)] = 100,
    written: Annotated[int, typer.Option(help="rows that the old base with the adapter writes besides", min=0)] = 0,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Migrate a real, tiny adapter between two real, tiny bases: no network, under three minutes."""
    with errors(as_json):
        with progress_line(as_json, verbose):
            from flows.demo import run_demo

            result = run_demo(output, pair, task, samples, written)
        if as_json:
            print_json(result)
        else:
            _show_migration(result, verbose)


def _show_migration(result: dict[str, Any], verbose: bool) -> None:
    output = Path(result["output"])
    if result.get("done_before"):
        Console().print(f"done before: {output} is the output of these inputs and settings", highlight=False)
    record = reporting.MigrationRecord.read(output / reporting.RECORD)
    reporting.show_migration(record, output, result.get("pushed"), verbose=verbose)


def main() -> None:
    """Entry point of the ``lorasuite`` command."""
    _quiet_libraries()
    run_app(app)
