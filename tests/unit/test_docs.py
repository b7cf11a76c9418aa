"""The reference pages say what the code does."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from rich.text import Text
from typer.main import get_command

from flows.command_line import app
from lorasuite.planning import FIRST, HEADINGS, MigrationConfig

DOCS = Path(__file__).parents[2] / "docs"
PAGES = runpy.run_path(str(DOCS / "generate.py"))["PAGES"]


@pytest.mark.parametrize("name", PAGES)
def test_page_is_in_step(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name](), "run: python docs/generate.py"


def test_help_says_what_the_settings_say() -> None:
    """Help goes through rich's markup, which takes ``[@revision]`` for a style unless it is escaped."""
    for path, command in runpy.run_path(str(DOCS / "generate.py"))["_walk"](get_command(app), ("lorasuite",)):
        for text in [command.help or "", *(getattr(parameter, "help", None) or "" for parameter in command.params)]:
            assert Text.from_markup(text).plain == text.replace("\\[", "["), f"{path}: {text}"


def test_what_everyone_needs_comes_first() -> None:
    settings = list(MigrationConfig.model_fields)
    named = [*FIRST, *(name for names in HEADINGS.values() for name in names)]
    assert sorted(named) == sorted(settings), "each setting has one place"
    shown = [p for p in get_command(app).commands["migrate"].params if p.name in settings]
    assert [p.name for p in shown if p.rich_help_panel is None] == list(FIRST)


def test_messages_that_troubleshooting_explains_are_said() -> None:
    code = "".join(file.read_text(encoding="utf-8") for file in (DOCS.parent / "lorasuite").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # sentences that go over two lines
    table = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").partition("## What people bring")[2]
    quoted = re.findall(r'"([^"]+)"', "".join(line.split("|")[2] for line in table.splitlines() if line.count("|") > 3))
    assert len(quoted) > 30
    # the code leaves a field's name open, and what a foreign file is
    for words in quoted:
        variants = {words, words.replace("'completion'", "{name!r}"), words.removeprefix("is ")}
        assert any(variant in code for variant in variants), words
