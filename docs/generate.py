"""Write the reference pages from code and data files: ``python docs/generate.py``. A test keeps them in step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from flows.command_line import app
from flows.options import flags
from lorasuite.bases import BUILT_IN, load
from lorasuite.planning import MigrationConfig

HERE = Path(__file__).parent
NOTE = "<!-- Written by docs/generate.py from the code: edit that, not this. -->\n"


def commands() -> str:
    """Every command, its arguments and options."""
    parts = [NOTE, "# Commands\n", f"{app.info.help}\n"]
    parts.append(
        "Exit codes: 0 done, 1 the work failed or a verdict is one that `--fail-on` names, 2 the input cannot be used. "
    )
    parts.append("With `--json`, standard output holds one JSON object; progress and logs are on standard error.\n")
    for path, command in _walk(typer.main.get_command(app), ("lorasuite",)):
        parts.append(f"\n## `{' '.join(path)}`\n\n{(command.help or '').strip()}\n")
        rows = [_row(parameter) for parameter in command.params if parameter.name != "help"]
        if rows:
            parts += ["\n| option | meaning |\n|---|---|\n", *rows]
    return "".join(part if part.endswith(("\n", " ")) else part + "\n" for part in parts)


def _walk(group: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _walk(command, (*path, name))
        else:
            yield (*path, name), command


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = f"`{parameter.name.upper()}`"
    else:
        name = " ".join(f"`{o}`" for o in [*parameter.opts, *parameter.secondary_opts])
    text = (getattr(parameter, "help", None) or "").replace("\\[", "[")
    if parameter.required:
        text += " (required)"
    elif parameter.default not in (None, False, (), "") and not callable(parameter.default) and "[default" not in text:
        text += f" [default: {parameter.default}]"
    return f"| {name} | {text.strip()} |\n"


def configuration() -> str:
    """Every setting of a migration: its place in a ``--config`` file, its flag, type, default and meaning."""
    parts = [
        NOTE,
        "# Configuration\n\n",
        "`lorasuite migrate --config FILE` reads these settings from YAML; flags override the file. ",
        "Nested settings are written as mappings (`finetune: {epochs: 3}`). An unknown setting is an error.\n\n",
        "| setting | flag | type | default | meaning |\n|---|---|---|---|---|\n",
    ]
    for parameter, path, info in flags(MigrationConfig):
        kind = str(info.annotation).replace("typing.", "").replace("<class '", "").replace("'>", "")
        kind = kind.replace("|", "or")
        default = "required" if info.is_required() else f"`{info.default}`"
        flag = "--" + parameter.replace("_", "-")
        parts.append(f"| `{'.'.join(path)}` | `{flag}` | {kind} | {default} | {info.description or ''} |\n")
    return "".join(parts)


def families() -> str:
    """The page of architectures, its table of families written from the files of the package."""
    head, _, rest = (HERE / "architectures.md").read_text(encoding="utf-8").partition("<!-- families -->\n")
    table = ["| file | model types | what sets it apart |\n|---|---|---|\n"]
    for file in sorted(BUILT_IN.glob("*.yaml")):
        family = load(file)
        types = ", ".join(f"`{model_type}`" for model_type in family.model_types)
        table.append(f"| `{file.stem}` | {types} | {family.notes} |\n")
    return f"{head}<!-- families -->\n{''.join(table)}<!-- /families -->{rest.partition('<!-- /families -->')[2]}"


PAGES = {"architectures.md": families, "commands.md": commands, "configuration.md": configuration}


if __name__ == "__main__":
    for name, write in PAGES.items():
        (HERE / name).write_text(write(), encoding="utf-8")
