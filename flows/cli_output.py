"""What all commands of the command line share: ``--json``, and errors as a message and an exit code."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Annotated, Any

import click
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

#: Environment variable that is set to show the traceback of an error, as ``--debug`` does.
DEBUG = "LORASUITE_DEBUG"

err = Console(stderr=True)


def debugging() -> bool:
    """Whether tracebacks are shown."""
    return os.environ.get(DEBUG, "") not in ("", "0")


def quiet_tracebacks() -> None:
    """Keep tracebacks out of what Prefect logs of a failed run, unless they are asked for: the error is told once."""
    make = logging.getLogRecordFactory()

    def record(*args: Any, **named: Any) -> logging.LogRecord:
        made = make(*args, **named)
        if made.name.startswith("prefect") and not debugging():
            made.exc_info = None
        return made

    logging.setLogRecordFactory(record)


def debug_option(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error (with any command)")] = False,
) -> None:
    """Move LoRA adapters to a new base model, and measure what arrives."""
    if debug:
        os.environ[DEBUG] = "1"


def run_app(app: typer.Typer) -> None:
    """Run the command that was typed; ``--debug`` may stand before or behind it."""
    quiet_tracebacks()
    if "--debug" in sys.argv[2:]:
        sys.argv = [sys.argv[0], "--debug", *(word for word in sys.argv[1:] if word != "--debug")]
    try:
        with errors("--json" in sys.argv):
            app()
    except click.exceptions.Exit as ended:  # of an error that no command was running at
        sys.exit(ended.exit_code)


@contextlib.contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Turn errors into a message and an exit code: 2 for input that cannot be used, 1 for a run that failed.

    The traceback of an error that nobody raised on purpose is shown with ``--debug``.
    """
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except (LoRASuiteError, ArtifactError) as error:
        problems = [problem.to_dict() for problem in getattr(error, "problems", [])]
        if as_json:
            print_json({"error": type(error).__name__, "message": str(error), "problems": problems})
        err.print(f"[bold red]{type(error).__name__}[/]", highlight=False)
        err.print(str(error), style="red", markup=False, highlight=False)
        _debug()
        raise typer.Exit(1 if isinstance(error, (NumericalError, PushError)) else 2) from None
    except Exception as error:
        name, text = type(error).__name__, " ".join(str(error).split())
        if as_json:
            print_json({"error": name, "message": text, "problems": []})
        err.print(f"[bold red]{name}[/]", highlight=False)
        err.print(text or "no message", style="red", markup=False, highlight=False)
        if not debugging():
            err.print(
                "This was not foreseen: --debug shows where it came from. Please report it with that.", highlight=False
            )
        _debug()
        raise typer.Exit(1) from None


def _debug() -> None:
    """The traceback of the error in hand, where it is asked for."""
    if debugging():
        sys.stderr.write(traceback.format_exc())


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
