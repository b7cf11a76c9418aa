"""What a terminal is told of a run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from flows import cli_output
from flows.time_left import TimeLeft
from tasks.progress import Progress, tell, watched


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.progress.running_stage", lambda: "finetune (scratch)")


def test_watchers_are_told_of_stages_and_steps(running: None) -> None:
    seen: list[tuple[str, int, int, str]] = []
    with watched(lambda *told: seen.append(told)):
        tell("transform")
        Progress().training(3, 10, 0.5)
    tell("afterwards")
    assert seen == [("transform", 0, 0, ""), ("finetune (scratch)", 3, 10, "loss 0.5000")]


@pytest.mark.parametrize(
    ("terminal", "verbose", "shown"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_a_line_in_a_terminal(
    terminal: bool, verbose: bool, shown: bool, running: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(cli_output, "err", Console(file=out, force_terminal=terminal, width=120))
    monkeypatch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "WARNING")
    with cli_output.progress_line(False, verbose, {"finetune": 4000.0}):
        tell("finetune")
        Progress().training(3, 10, 0.5)
    assert ("1:06:40" in out.getvalue() or "1:06:39" in out.getvalue()) is shown
    assert ("finetune (scratch): 3 of 10, loss 0.5000" in out.getvalue()) is shown
    assert ("left" in out.getvalue()) is shown


def test_the_time_left_is_that_of_the_whole_run() -> None:
    now = [0.0]
    run = TimeLeft({"vocabulary": 10.0, "activations": 20.0, "finetune": 100.0, "evaluate": 50.0}, lambda: now[0])
    assert run.left() == 180.0
    run.told("vocabulary", 0, 0)
    now[0] = 4.0
    assert run.left() == 176.0
    now[0] = 20.0  # twice its estimate: so will the others be
    run.told("activations", 0, 0)
    assert run.left() == 2 * 170.0
    now[0] = 20.1  # found in the store: says nothing of the machine
    run.told("finetune (fresh)", 0, 0)
    assert run.left() == 2 * 150.0
    now[0] = 80.1
    run.told("finetune (copy)", 0, 0)  # more of the same stage
    assert run.left() == pytest.approx(140.0 + 100.0)
    run.told("finetune (copy)", 1, 4)
    now[0] = 180.1  # three quarters are left of what took longer than the whole was to take
    assert run.left() == pytest.approx(300.0 + 100.0)
    run.told("evaluate", 0, 0)
    now[0] = 2000.0
    assert run.left() == 0.0
    run.told("publish", 0, 0)
    assert run.left() == 0.0 and TimeLeft({}).left() is None
