"""What a user of the command line sees of an error that nobody raised on purpose."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import typer
from typer.testing import CliRunner

from flows import cli_output, command_line
from lorasuite import reporting
from lorasuite.errors import ConfigError, Problem


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that fails inside."""

    def fail(_folder: object) -> None:
        raise RuntimeError("no more\n   room")

    monkeypatch.setattr(reporting, "write_report", fail)
    monkeypatch.delenv(cli_output.DEBUG, raising=False)


@pytest.mark.usefixtures("broken")
def test_an_error_that_was_not_foreseen_is_a_line_and_no_traceback() -> None:
    result = CliRunner().invoke(command_line.app, ["report", "x"])
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "RuntimeError" in result.output and "no more room" in result.output and "--debug" in result.output
    found = CliRunner().invoke(command_line.app, ["report", "x", "--json"])
    told = json.loads(found.stdout)
    (problem,) = told["problems"]
    assert told["error"] == "RuntimeError" and problem["what"] == "no more room" and "--debug" in problem["remedy"]


@pytest.mark.usefixtures("broken")
def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(cli_output.DEBUG, "0")  # so that what the option sets is taken back
    for arguments in (["--debug", "report", "x"], ["report", "x", "--debug"]):
        monkeypatch.setenv(cli_output.DEBUG, "0")
        monkeypatch.setattr(sys, "argv", ["lorasuite", *arguments])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        said = capsys.readouterr().err
        assert ended.value.code == 1 and "Traceback" in said and "in fail" in said and "--debug" not in said


def test_logged_tracebacks_of_prefect_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    factory = logging.getLogRecordFactory()
    monkeypatch.delenv(cli_output.DEBUG, raising=False)
    try:
        cli_output.quiet_tracebacks()
        made = logging.getLogRecordFactory()
        error = (ValueError, ValueError("x"), None)

        def traced(name: str) -> bool:
            return made(name, logging.ERROR, "f", 1, "m", (), error).exc_info is not None

        assert not traced("prefect.flow_runs") and traced("lorasuite")
        monkeypatch.setenv(cli_output.DEBUG, "1")
        assert traced("prefect.flow_runs")
    finally:
        logging.setLogRecordFactory(factory)


def test_names_that_are_no_text_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A file's name of bytes that are no UTF-8 comes as a surrogate, which no terminal takes."""
    with pytest.raises(typer.Exit), cli_output.errors(as_json=True):
        raise ConfigError(Problem("a\udce9", "is no file", "Give another."))
    assert json.loads(capsys.readouterr().out)["problems"][0]["where"] == "a\\udce9"
    cli_output.print_json({"name": "a\udce9"})
    assert json.loads(capsys.readouterr().out) == {"name": "a\udce9"}
