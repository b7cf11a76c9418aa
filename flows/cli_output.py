"""What all commands of the command line share: ``--json``, and errors as a message and an exit code."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console

from artifacts import ArtifactError
from lorasuite.errors import LoRASuiteError, NumericalError, PushError

Json = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]

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
