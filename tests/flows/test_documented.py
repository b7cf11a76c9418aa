"""The commands that README and the first page of the manual show, as they stand, with a miniature pair."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.command_line import app
from tests.recorded import HEAD, PAGE, WIDTH, prepare, session, stable

ROOT = Path(__file__).parents[2]


def commands(page: str) -> list[list[str]]:
    """Arguments of every ``$ lorasuite …`` in a page's console blocks, but for the demo, which takes minutes."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"^```console\n(.*?)^```", text, flags=re.M | re.S))
    found = [shlex.split(line, comments=True)[2:] for line in blocks.splitlines() if line.startswith("$ lorasuite ")]
    return [arguments for arguments in found if arguments[0] != "demo"]


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_they_run(page: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare()
    found = commands(page)
    assert [arguments[0] for arguments in found] == ["inspect", "migrate"]
    for arguments in found:
        ran = CliRunner().invoke(app, arguments)
        assert ran.exit_code == 0, ran.output
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "migration.json",
        "report.html",
        "README.md",
        "samples",
    } <= {path.name for path in Path("OUT").iterdir()}


def test_the_recorded_session(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    prepare()
    parts = list(session())
    assert [code for _, code in parts] == [0, 0, 0, 2, 0], parts
    said = stable(HEAD + "".join(text for text, _ in parts))
    assert said == stable(PAGE.read_text(encoding="utf-8")), "run: python -m tests.recorded"


def test_what_the_text_names_is_there() -> None:
    text = (ROOT / "docs" / "getting-started.md").read_text()
    for command, subcommand in re.findall(r"`lorasuite (\w+)(?: ([\w|]+))?", text):
        for name in (subcommand or "").split("|"):
            ran = CliRunner().invoke(app, [command, *([name] if name else []), "--help"])
            assert ran.exit_code == 0, ran.output
