"""What all commands of the command line share: ``--json``, and errors as a message and an exit code."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console

from artifacts import ArtifactError
from lorasuite.errors import LoRASuiteError, NumericalError, PushError

Json = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]

#: Heading of options that say how a command runs, and what it does at the end.
RUN = "The run, and its end"
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", help="logs in place of a line of progress, and every table at the end", rich_help_panel=RUN
    ),
]

err = Console(stderr=True)


@contextlib.contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Turn errors raised on purpose into a message and an exit code; others keep their traceback."""
    try:
        yield
    except (LoRASuiteError, ArtifactError) as error:
        problems = [problem.to_dict() for problem in getattr(error, "problems", [])]
        if as_json:
            print_json({"error": type(error).__name__, "message": str(error), "problems": problems})
        err.print(f"[bold red]{type(error).__name__}[/]", highlight=False)
        err.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1 if isinstance(error, (NumericalError, PushError)) else 2) from None


def print_json(value: Any) -> None:
    """One line of JSON on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def progress_line(as_json: bool, verbose: bool) -> Iterator[None]:
    """In a terminal one line: the stage, how far it is and how long it will take. Elsewhere, or if asked, logs.

    Before Prefect is imported, which reads its settings then.
    """
    if as_json or verbose or not err.is_terminal:
        yield
        return
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "WARNING")
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from tasks.progress import watched

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, redirect_stdout=False) as bar:
        line = bar.add_task("starting", total=None)

        def show(what: str, done: int, total: int, text: str) -> None:
            told = what + (f": {done} of {total}" if total else "") + (f", {text}" if text else "")
            if bar.tasks[0].total != (total or None) or done < bar.tasks[0].completed:
                bar.reset(line, total=total or None)
            bar.update(line, description=told, completed=done)

        with watched(show):
            yield
