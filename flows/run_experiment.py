"""Experiments: every cell of the tables of an experiment file, through the same cached stages as a migration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.logging.loggers import get_run_logger
from prefect.runtime import flow_run

from flows.context import check_stages, fetch, tag_run
from flows.dashboard import slug
from flows.lab import Lab
from lorasuite.adapters import Adapter
from lorasuite.errors import LoRASuiteError, OutputError, PreflightError, Problem
from lorasuite.planning import Cell, Experiment, inspect, read_experiment
from lorasuite.reporting import RESULTS, Measurement, kept, read_results, write_results


def plan(
    experiment: Experiment, output: Path, only: tuple[str, ...] = (), refresh: tuple[str, ...] = ()
) -> list[Measurement]:
    """Every cell that a run would have, and whether it is in the store. Computes nothing, downloads nothing.

    Returns:
        the cells; ``cached`` is None where the bases or the data are not on this machine, so that nothing is known.

    Raises:
        ConfigError: for a table or stage that does not exist.
    """
    cells = _chosen(experiment, only)
    refreshed = check_stages(refresh)
    pair = experiment.config.pair
    unknown = [
        Measurement(table=c.table, arm=c.arm, task=c.task, seed=c.seed, level=dict(c.level), cached=None) for c in cells
    ]
    if not all(_is_here(str(base)) for base in (pair.old_base, pair.new_base)):
        return unknown
    lab = Lab(experiment, output / "data", dry=True, refresh=refreshed)
    found = []
    for cell, nothing in zip(cells, unknown, strict=True):
        try:
            found.append(lab.measure(cell))
        except LoRASuiteError:  # no data, or an adapter that is still on the Hub
            found.append(nothing)
    return found


def _is_here(source: str) -> bool:
    """Whether a base is a directory, or in the Hub's local cache."""
    if Path(source).expanduser().is_dir():
        return True
    name, _, revision = source.partition("@")
    try:
        snapshot_download(name, revision=revision or None, local_files_only=True)
    except Exception:  # the Hub client raises many kinds
        return False
    return True


def _chosen(experiment: Experiment, only: tuple[str, ...]) -> list[Cell]:
    tables = experiment.tables(only)
    return [cell for cell in experiment.cells if cell.table in tables]


def _check(experiment: Experiment, cells: list[Cell], lab: Lab) -> None:
    """Everything that can be known to be wrong before the first training.

    Args:
        lab: a dry one.

    Raises:
        PreflightError: with every problem.
    """
    pair, first = experiment.config.pair, cells[0].settings.migration
    problems = inspect(
        str(pair.old_base),
        str(pair.new_base),
        trust_remote_code=first.trust_remote_code,
        architectures=first.architectures,
    ).problems
    for name in dict.fromkeys(cell.task for cell in cells):
        try:
            task = lab.task(name)
            _ = task.train, task.texts
            if task.config.include_path is not None and not Path(task.config.include_path).is_dir():
                problems.append(Problem(task.config.include_path, "is not a directory", "Give lm-eval task files."))
            if task.config.adapter is not None:
                problems += Adapter.open(task.config.adapter, first.allow_pickle).check(lab.old)
            if task.config.retrained is not None:
                problems += Adapter.open(task.config.retrained, first.allow_pickle).check(lab.new)
        except LoRASuiteError as error:
            problems += error.problems
    for cell in cells if not problems else []:
        try:
            lab.measure(cell)
        except LoRASuiteError as error:
            problems += [Problem(f"{cell}: {p.where}", p.what, p.remedy) for p in error.problems]
    if problems:
        raise PreflightError(problems)


def _run_name() -> str:
    return Path(str(flow_run.parameters.get("file"))).stem


@flow(name="run-experiment", flow_run_name=_run_name, validate_parameters=False)
def run_experiment(file: str, output: str, only: tuple[str, ...] = (), refresh: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run what is missing of an experiment, and write its tables and figures.

    A run that was stopped goes on where it was: every stage of every cell is an artifact. The tables are written
    after each of them is complete, and cover all tables that were ever run into ``output``.

    Args:
        file: the experiment file.
        output: directory for results; one that holds results of the same experiment is gone on with.
        only: tables to run; all of them if empty.
        refresh: names of stages to compute again.

    Returns:
        ``experiment``, ``pair``, ``output``; how many cells there are, were ``computed`` and ``cached``; the
        ``failed`` ones with the reason; the ``tables`` as in ``results.json``.

    Raises:
        ConfigError, PreflightError, OutputError: for what cannot be run.
    """
    experiment = read_experiment(Path(file))
    refreshed = check_stages(tuple(refresh))
    cells = _chosen(experiment, tuple(only))
    folder = Path(output)
    before = _results_before(experiment, folder)
    pair = experiment.config.pair
    ready = [task.adapter for task in experiment.config.tasks.values()]
    ready += [task.retrained for task in experiment.config.tasks.values()]
    tag_run(experiment=experiment.config.name)
    fetch(str(pair.old_base), str(pair.new_base), *(source for source in ready if source))
    folder.mkdir(parents=True, exist_ok=True)
    look = Lab(experiment, folder / "data", dry=True)
    _check(experiment, cells, look)
    lab = Lab(experiment, folder / "data", dry=False, refresh=refreshed)
    lab.tasks = look.tasks  # read once
    log = get_run_logger()
    found: list[Measurement] = []
    done = kept(experiment, before)
    for name, members in _by_table(cells):
        rows = []
        for cell in members:
            rows.append(lab.measure(cell))
            found.append(rows[-1])
            log.info("%d of %d: %s %s", len(found), len(cells), cell, rows[-1].state())
        done[name] = rows
        tables = write_results(experiment, done, folder)
    shown = {name: table for name, table in tables.items() if name in experiment.tables(only)}
    create_markdown_artifact(
        "\n\n".join(table["markdown"] for table in shown.values()),
        key=slug("experiment", experiment.config.name),
        description=f"Tables of {experiment.config.name}",
    )
    return {
        "experiment": experiment.config.name,
        "pair": experiment.pair_name,
        "output": str(folder),
        "cells": len(found),
        "computed": sum(not m.cached and not m.failed for m in found),
        "cached": sum(bool(m.cached) for m in found),
        "failed": [{"cell": m.name(), "reason": m.failed} for m in found if m.failed],
        "tables": shown,
    }


def _by_table(cells: list[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    for name in dict.fromkeys(cell.table for cell in cells):
        yield name, [cell for cell in cells if cell.table == name]


def _results_before(experiment: Experiment, folder: Path) -> dict[str, tuple[str, list[Measurement]]]:
    """What earlier runs left in the output directory, by table.

    Raises:
        OutputError: if it is another experiment's, or something else.
    """
    if not folder.exists():
        return {}
    if not folder.is_dir() or not ((folder / RESULTS).is_file() or {p.name for p in folder.iterdir()} <= {"data"}):
        raise OutputError(Problem(str(folder), "holds something else", "Give a new --output, or one of an experiment."))
    if not (folder / RESULTS).is_file():
        return {}
    name, rows = read_results(folder)
    if name != experiment.config.name:
        raise OutputError(Problem(str(folder), f"holds the results of {name}", "Give another --output."))
    return rows
