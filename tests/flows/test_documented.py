"""The commands that README and the first page of the manual show, as they stand, with a tiny pair for OLD and NEW."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.command_line import app
from tests.flows.small import Small

ROOT = Path(__file__).parents[2]


def commands(page: str) -> list[list[str]]:
    """Arguments of every ``$ lorasuite …`` in a page's console blocks, but for the demo, which takes minutes."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"^```console\n(.*?)^```", text, flags=re.M | re.S))
    found = [shlex.split(line, comments=True)[2:] for line in blocks.splitlines() if line.startswith("$ lorasuite ")]
    return [arguments for arguments in found if arguments[0] != "demo"]


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_they_run(page: str, home: Path, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"OLD": small.old, "NEW": small.new, "ADAPTER": small.root / "adapters" / "one"}
    monkeypatch.chdir(tmp_path)
    for name, count in (("texts", 12), ("train", 12), ("test", 4)):
        rows = [{"prompt": f"w{n} w{n + 1} w{2 * n} w{n + 5}", "completion": f" w{n}"} for n in range(count)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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
