"""A drafted configuration is one: as written, and with every setting switched on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flows.command_line import app
from lorasuite.planning import MigrationConfig, build, draft_config, output_name, read_config

GIVEN = {"adapter": "a", "old_base": "b", "new_base": "c", "output": "d"}


def test_a_draft_says_every_setting_and_changes_none() -> None:
    plain = build(MigrationConfig, GIVEN)
    text = draft_config({**GIVEN, "columns": ["prompt=text"], "finetune": {"epochs": 2}}, ["a note: of the pair"])
    assert max(map(len, text.splitlines())) <= 120 and "# a note: of the pair\n" in text
    assert build(MigrationConfig, yaml.safe_load(text)) == build(
        MigrationConfig, {**GIVEN, "columns": ["prompt=text"], "finetune": {"epochs": 2}}
    )
    text = draft_config(GIVEN)
    on = re.sub(r"^#(?! )|^#(?=  )", "", text, flags=re.MULTILINE)
    assert yaml.safe_load(on).keys() == MigrationConfig.model_fields.keys()
    assert build(MigrationConfig, yaml.safe_load(on)) == plain


def test_names_of_outputs() -> None:
    assert output_name("runs/my adapter", "org/new-base@v1") == "my-adapter-on-new-base"
    assert output_name("a:0.7,b:0.3", "c") == "a-0.7-b-0.3-on-c"


def test_init(base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path) -> None:
    old, new = base("llama"), base("llama", seed=2, layers=4)
    file = tmp_path / "m.yaml"
    arguments = ["init", "--adapter", str(lora(old)), "--new-base", str(new), "--file", str(file)]
    done = CliRunner().invoke(app, [*arguments, "--old-base", str(old)])
    assert done.exit_code == 0, done.output
    found = build(MigrationConfig, read_config(file))
    assert (found.old_base, found.new_base, found.finetune.passes) == (str(old), str(new), 3)
    assert "# The bases differ in: layers" in file.read_text() and "lorasuite inspect --config" in done.output
    again = CliRunner().invoke(app, [*arguments, "--old-base", str(old)])
    assert again.exit_code == 2 and "exists already" in again.output
    file.unlink()
    bad = CliRunner().invoke(app, ["init", "--adapter", str(lora(old)), "--new-base", "./none", "--file", str(file)])
    assert bad.exit_code == 2 and not file.exists() and "./none" in bad.output


@pytest.mark.parametrize("name", ["adapter", "new_base"])
def test_init_needs_an_adapter_and_a_new_base(name: str, lora: Callable[..., Path], base: Callable[..., Path]) -> None:
    given = {"adapter": str(lora(base("llama"))), "new_base": "./none"}
    flag = name.replace("_", "-")
    arguments = [part for key, value in given.items() if key != name for part in ("--" + key.replace("_", "-"), value)]
    done = CliRunner().invoke(app, ["init", *arguments])
    assert done.exit_code == 2 and f"Give --{flag}" in done.output
