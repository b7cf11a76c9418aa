"""A fleet: many adapters, one or more pairs of bases, described by one YAML file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from pydantic import Field

from lorasuite.adapters import replace_sources, sources_name
from lorasuite.errors import ConfigError, Problem
from lorasuite.evaluation import Gate
from lorasuite.planning._config import MigrationConfig
from lorasuite.planning._reading import Strict, build, located, located_data, merged, read_config

#: Settings that name a model or adapter: a directory beside the fleet file, or a Hub id.
MODELS = ("adapter", "old_base", "new_base")
#: Settings that name data: always files, relative to the fleet file.
DATA = (
    "calibration",
    "train_data",
    "prompts",
    "eval_data",
    "general_texts",
    "serving_gguf",
    "eval_dir",
    "include_path",
    "architectures",
)
#: The longest name of a file on the file systems there are.
NAME_BYTES = 255


class FleetPair(Strict):
    """Two bases and the adapters to move from one to the other."""

    old_base: str
    new_base: str
    defaults: dict[str, Any] = Field({}, description="settings of this pair's adapters")
    adapters: list[dict[str, Any]] = Field(
        min_length=1, description="`adapter`, optionally `name`, and any setting of a migration"
    )


class FleetConfig(Strict):
    """The fleet file."""

    output: str = Field(
        "migrated", pattern=r"^[^\x00]+$", description="directory: output/<new base>/<adapter> for each adapter"
    )
    defaults: dict[str, Any] = Field({}, description="settings of every adapter")
    gate: Gate = Gate()
    pairs: list[FleetPair] = Field(min_length=1)


def read_fleet(
    source: str | Path | Mapping[str, Any], *, old_base: str | None = None, new_base: str | None = None
) -> dict[str, MigrationConfig]:
    """Every migration of a fleet, by the adapter's name and, where several pairs use one name, its new base.

    Args:
        source: the YAML file, whose directory relative paths start from, or its content (then: this directory).
        old_base: only the pairs whose old base this is.
        new_base: take this new base in place of the file's.

    Raises:
        ConfigError: with every unknown or invalid setting, and adapters that would share an output directory.
    """
    content = dict(source) if isinstance(source, Mapping) else read_config(Path(source))
    folder = Path() if isinstance(source, Mapping) else Path(source).absolute().parent
    where = "fleet" if isinstance(source, Mapping) else str(source)
    fleet: FleetConfig = build(FleetConfig, content, where)
    root = folder / fleet.output
    problems: list[Problem] = []
    found: list[tuple[str, MigrationConfig]] = []
    for p, pair in enumerate(fleet.pairs):
        if old_base is not None and located(pair.old_base, folder) != located(old_base, Path()):
            continue
        target = pair.new_base if new_base is None else new_base
        for a, entry in enumerate(pair.adapters):
            place = f"{where}: pairs.{p}.adapters.{a}"
            values = merged(fleet.defaults, pair.defaults, entry)
            name = str(values.pop("name", "") or sources_name(str(values.get("adapter", ""))))
            if wrong := _name_problems(name, f"{place}.name"):
                problems += wrong
                continue
            fixed = sorted({"old_base", "new_base", "output", "gate"} & set(values))
            if fixed:
                problems += [Problem(f"{place}.{key}", "belongs to the pair or the fleet", "Move it.") for key in fixed]
                continue
            base = located(target, folder if new_base is None else Path())
            values |= {
                "old_base": located(pair.old_base, folder),
                "new_base": base,
                "output": str(root / Path(base).name / name),
                "gate": fleet.gate.model_dump(),
            }
            if isinstance(values.get("adapter"), str):
                values["adapter"] = replace_sources(values["adapter"], lambda source: located(source, folder))
            values |= {key: located_data(str(values[key]), folder) for key in DATA if values.get(key)}
            try:
                found.append((name, build(MigrationConfig, values, place)))
            except ConfigError as error:
                problems += error.problems
    outputs = [config.output for _, config in found]
    problems += [
        Problem(where, f"{path!r} is not below the fleet's output {root}", "Give the adapter or new base another name.")
        for path in outputs
        if not _inside(Path(path), root)
    ]
    problems += [
        Problem(where, f"two adapters would be written to {path}", "Give one of them another `name`.")
        for path in sorted({path for path in outputs if outputs.count(path) > 1})
    ]
    if not found and not problems:
        problems.append(Problem(where, f"no pair has the old base {old_base}", "Check old_base."))
    if problems:
        raise ConfigError(problems)
    names = [name for name, _ in found]
    return {
        name if names.count(name) == 1 else f"{Path(config.new_base).name}/{name}": config for name, config in found
    }


def _name_problems(name: str, where: str) -> list[Problem]:
    """Why an adapter's name cannot be that of a directory below the fleet's output."""
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or not name.isprintable():
        what = f"{name!r} is no name of a directory below the fleet's output"
        return [Problem(where, what, "Give a relative one without .. and control characters.")]
    if any(len(os.fsencode(part)) > NAME_BYTES for part in path.parts):
        return [Problem(where, f"{name[:40]!r}... is longer than file names can be", "Give a shorter `name`.")]
    return []


def _inside(path: Path, root: Path) -> bool:
    """Whether a directory lies below another, whatever links lead to."""
    try:
        return path.resolve() != root.resolve() and path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name that is too long or holds NUL
        return False


def fleet_output(source: str | Path | Mapping[str, Any]) -> Path:
    """The directory that a fleet's adapters are written under, and its own report into."""
    content = source if isinstance(source, Mapping) else read_config(Path(source))
    folder = Path() if isinstance(source, Mapping) else Path(source).absolute().parent
    return folder / str(content.get("output", FleetConfig.model_fields["output"].default))


def chosen(fleet: Mapping[str, MigrationConfig], only: Sequence[str]) -> dict[str, MigrationConfig]:
    """The migrations named in ``only``, or all of them.

    Raises:
        ConfigError: naming every adapter the fleet does not have.
    """
    wrong = [name for name in only if name not in fleet]
    if wrong:
        known = "The fleet has " + ", ".join(sorted(fleet)) + "."
        raise ConfigError([Problem("--only", f"no adapter {name!r}", known) for name in wrong])
    return {name: config for name, config in fleet.items() if not only or name in only}
