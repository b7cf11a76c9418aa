"""The command ``lorasuite init``: a configuration to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from flows.cli_output import Json, errors, print_json
from flows.options import with_settings
from lorasuite.errors import ConfigError, OutputError, Problem
from lorasuite.planning import MigrationConfig, build, draft_config, output_name

#: What a draft is given; everything else is written into it at its default.
GIVEN = (
    "adapter", "old_base", "new_base", "output", "train_data", "eval_data", "calibration", "prompts", "columns",
    "trust_remote_code", "allow_pickle", "architectures",
)  # fmt: skip


@with_settings(MigrationConfig, GIVEN)
def init(
    values: dict[str, Any],
    file: Annotated[Path, typer.Option("--file", help="YAML file to write")] = Path("migration.yaml"),
    as_json: Json = False,
) -> None:
    """Write a commented configuration for an adapter and two bases: what is given, and every other setting.

    The old base is read from the adapter where it is not given. Nothing is downloaded but configs and headers.
    """
    with errors(as_json):
        if file.exists():
            raise OutputError(Problem(str(file), "exists already", "Give another --file: nothing is overwritten."))
        if "old_base" not in values and "adapter" in values:
            values["old_base"] = _trained_on(values["adapter"], bool(values.get("allow_pickle")))
        if "adapter" in values and "new_base" in values:
            values.setdefault("output", output_name(values["adapter"], values["new_base"]))
        settings = build(MigrationConfig, values)
        from lorasuite.planning import inspect

        found = inspect(
            settings.old_base,
            settings.new_base,
            settings.adapter,
            trust_remote_code=settings.trust_remote_code,
            allow_pickle=settings.allow_pickle,
            architectures=settings.architectures,
        )
        found.raise_problems()
        changed = [f"{row['name']} {row['old']} → {row['new']}" for row in found.factors if row["changed"]]
        notes = [
            "The adapter: {kind}, rank {rank}, {modules} modules.".format(**found.adapter),
            "The bases differ in: " + (", ".join(changed) or "nothing that shapes show") + ".",
            *(f"Note: {notice}" for notice in found.notices),
        ]
        file.write_text(draft_config(values, notes), encoding="utf-8")
        if as_json:
            print_json({"config": str(file), "notes": notes})
            return
        console = Console()
        for line in (*notes, f"written to {file}; next:", f"  lorasuite inspect --config {file}"):
            console.print(line, highlight=False, soft_wrap=True, markup=False)


def _trained_on(adapter: str, allow_pickle: bool) -> str:
    """The base that an adapter's config names."""
    from lorasuite.adapters import open_adapters

    named = open_adapters(adapter, allow_pickle).config.get("base_model_name_or_path")
    if not named:
        raise ConfigError(Problem(adapter, "its config names no base that it was trained on", "Give --old-base."))
    return str(named)
