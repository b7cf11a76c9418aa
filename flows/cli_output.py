"""What all commands of the command line share: ``--json``, and errors as a message and an exit code."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.rich_utils import rich_format_error

from artifacts import ArtifactError
from flows.interruption import interruptible, signal_of
from lorasuite.errors import LoRASuiteError, MachineError, NumericalError, Problem, PushError, foreseen, told
from tasks import at_work

#: What typer raises for a command line that cannot be read, wherever it has it from.
UsageError: Any = typer.BadParameter.__mro__[2]

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
    """Run the command that was typed, to its one end; ``--debug`` may stand before or behind it."""
    quiet_tracebacks()
    if "--debug" in sys.argv[2:]:
        sys.argv = [sys.argv[0], "--debug", *(word for word in sys.argv[1:] if word != "--debug")]
    as_json = "--json" in sys.argv

    def last_words(number: signal.Signals) -> None:
        _tell("Interrupted", _interrupted(number), as_json)
        err.show_cursor()
        sys.stdout.flush()

    code: Any = 0
    try:
        with interruptible(at_work.is_computing, last_words), errors(as_json):
            code = app(standalone_mode=False, prog_name="lorasuite") or 0
    except typer.Exit as ended:
        code = ended.exit_code
    if code > 128:  # a signal: nobody waits for Prefect's server to stop, which the watchdog sees to
        sys.stdout.flush()
        os._exit(code)
    logging.getLogger("prefect").setLevel(logging.WARNING)  # that its server stops: what was said is the end
    sys.exit(code)


@contextlib.contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Turn errors into a message and an exit code: 2 for input that cannot be used, 1 for a run that failed.

    What the machine refused is named (:func:`lorasuite.errors.foreseen`); the traceback of an error that nobody raised
    on purpose is shown with ``--debug``. An interruption ends with 128 and the number of its signal.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt as error:
        number = signal_of(error)
        _tell("Interrupted", _interrupted(number), as_json)
        raise typer.Exit(128 + number) from None
    except BrokenPipeError:  # who read the output has gone: `lorasuite artifacts ls | head`
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except Exception as error:
        if isinstance(error, UsageError):
            _misused(error, as_json)
            raise typer.Exit(2) from None
        raised = error if isinstance(error, (LoRASuiteError, ArtifactError)) else foreseen(error)
        if raised is not None:
            _tell(type(raised).__name__, raised, as_json)
        else:
            text = " ".join(str(error).split()) or "no message"
            where = "where it came from is below" if debugging() else "--debug shows where it came from"
            remedy = f"This was not foreseen; {where}. Please report it with that."
            _tell(type(error).__name__, LoRASuiteError(Problem("lorasuite", text, remedy)), as_json)
        _debug()
        failed = isinstance(raised, (NumericalError, PushError, MachineError)) or raised is None
        raise typer.Exit(1 if failed else 2) from None


def _tell(name: str, error: Exception, as_json: bool) -> None:
    """The last lines: what failed, where, and what to do."""
    message = told(str(error))
    problems = [problem.to_dict() for problem in getattr(error, "problems", [])]
    if as_json:
        with contextlib.suppress(OSError):  # it may be standard output that cannot be written
            print_json({"error": name, "message": message, "problems": problems})
    err.print(f"[bold red]{name}[/]", highlight=False)
    err.print(message, style="red", markup=False, highlight=False)


def _interrupted(number: signal.Signals) -> LoRASuiteError:
    """What was stopped, and what was kept."""
    by = "Ctrl-C" if number == signal.SIGINT else number.name
    stage, (kept, computed) = at_work.current(), at_work.kept()
    what = f"stopped by {by}" + (" before it was done" if stage else "")
    if kept:
        result = f"Kept: {kept} {'stage' if kept == 1 else 'stages'}, {computed} of them computed now. "
    else:
        result = "No stage was done. "
    again = "The same command goes on from there; a fine-tune from its last checkpoint." if kept or stage else ""
    return LoRASuiteError(Problem(f"stage {stage}" if stage else "lorasuite", what, (result + again).strip()))


def _misused(error: UsageError, as_json: bool) -> None:
    """A command line that cannot be read, as typer shows it."""
    if as_json:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "lorasuite"
        problem = Problem(command, " ".join(error.format_message().split()).rstrip("."), f"See `{command} --help`.")
        with contextlib.suppress(OSError):
            print_json({"error": "UsageError", "message": str(problem), "problems": [problem.to_dict()]})
    rich_format_error(error)


def _debug() -> None:
    """The traceback of the error in hand, where it is asked for."""
    if debugging():
        sys.stderr.write(traceback.format_exc())


def print_json(value: Any) -> None:
    """One line of JSON on standard output."""
    text = json.dumps(value, ensure_ascii=False)
    with contextlib.suppress(UnicodeEncodeError):
        text.encode(sys.stdout.encoding or "utf-8")
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
        return
    sys.stdout.write(json.dumps(value) + "\n")  # names of files that are no text, or a terminal that has few letters
    sys.stdout.flush()  # where it cannot be written, that is said


def has_progress_line(as_json: bool, verbose: bool) -> bool:
    """Whether :func:`progress_line` shows one: in a terminal, where no logs and no JSON are asked for."""
    return err.is_terminal and not as_json and not verbose


@contextlib.contextmanager
def progress_line(as_json: bool, verbose: bool, seconds: Mapping[str, float] | None = None) -> Iterator[None]:
    """In a terminal one line: the stage, how far it is and how long the run will take. Elsewhere, or if asked, logs.

    Before Prefect is imported, which reads its settings then.

    Args:
        seconds: estimated for each stage; without them the time left is that of the stage.
    """
    if not has_progress_line(as_json, verbose):
        yield
        return
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "WARNING")
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from flows.time_left import TimeLeft
    from tasks.progress import watched

    clock = TimeLeft(seconds or {})

    class RunLeft(ProgressColumn):
        """Of the whole run."""

        def render(self, _: object) -> str:
            return str(timedelta(seconds=round(clock.left() or 0)))

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("left"),
        RunLeft() if seconds else TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, redirect_stdout=False) as bar:
        line = bar.add_task("starting", total=None)

        def show(what: str, done: int, total: int, text: str) -> None:
            clock.told(what, done, total)
            shown = what + (f": {done} of {total}" if total else "") + (f", {text}" if text else "")
            if bar.tasks[0].total != (total or None) or done < bar.tasks[0].completed:
                bar.reset(line, total=total or None)
            bar.update(line, description=shown, completed=done)

        with watched(show):
            yield
