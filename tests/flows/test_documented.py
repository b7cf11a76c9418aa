"""The commands that README and the first page of the manual show, as they stand, with a miniature pair."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.command_line import app
from lorasuite import zoo

ROOT = Path(__file__).parents[2]


def commands(page: str) -> list[list[str]]:
    """Arguments of every ``$ lorasuite …`` in a page's console blocks, but for the demo, which takes minutes."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"^```console\n(.*?)^```", text, flags=re.M | re.S))
    found = [shlex.split(line, comments=True)[2:] for line in blocks.splitlines() if line.startswith("$ lorasuite ")]
    return [arguments for arguments in found if arguments[0] != "demo"]


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_they_run(page: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = zoo.pair("neox")
    names = {"OLD": pair.old, "NEW": pair.new, "ADAPTER": pair.adapter("mirror")}
    monkeypatch.chdir(tmp_path)
    zoo.write_rows([{"text": text} for text in zoo.texts("neox", 12)], Path("texts.jsonl"))
    zoo.write_rows(
        [{"prompt": row["prompt"]} for row in zoo.rows("neox", "mirror", "train", 12)], Path("prompts.jsonl")
    )
    for name, count in (("train", 12), ("test", 4)):
        zoo.write_rows(zoo.rows("neox", "mirror", name, count, seed=5), Path(f"{name}.jsonl"))
    found = commands(page)
    assert [arguments[0] for arguments in found] == ["inspect", "migrate"]
    for arguments in found:
        ran = CliRunner().invoke(app, [str(names.get(word, word)) for word in arguments])
        assert ran.exit_code == 0, ran.output
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "migration.json",
        "report.html",
        "README.md",
        "samples",
    } <= {path.name for path in Path("OUT").iterdir()}


def test_what_the_text_names_is_there() -> None:
    text = (ROOT / "docs" / "getting-started.md").read_text()
    for command, subcommand in re.findall(r"`lorasuite (\w+)(?: ([\w|]+))?", text):
        for name in (subcommand or "").split("|"):
            ran = CliRunner().invoke(app, [command, *([name] if name else []), "--help"])
            assert ran.exit_code == 0, ran.output
