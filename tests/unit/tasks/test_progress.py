"""What a terminal is told of a run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from flows import cli_output
from tasks.progress import Progress, tell, watched


def test_watchers_are_told_of_stages_and_steps() -> None:
    seen: list[tuple[str, int, int, str]] = []
    with watched(lambda *told: seen.append(told)):
        tell("transform")
        Progress("fine-tuning").training(3, 10, 0.5)
    tell("afterwards")
    assert seen == [("transform", 0, 0, ""), ("fine-tuning", 3, 10, "loss 0.5000")]


@pytest.mark.parametrize(
    ("terminal", "verbose", "shown"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_a_line_in_a_terminal(terminal: bool, verbose: bool, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(cli_output, "err", Console(file=out, force_terminal=terminal, width=120))
    monkeypatch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "WARNING")
    with cli_output.progress_line(False, verbose):
        Progress("fine-tuning").training(3, 10, 0.5)
    assert ("fine-tuning: 3 of 10, loss 0.5000" in out.getvalue()) is shown
    assert ("left" in out.getvalue()) is shown
