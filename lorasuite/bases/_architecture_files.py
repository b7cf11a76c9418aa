"""The architecture files: one YAML file a model family, in ``architectures/`` and in directories of the user's own.

Adding a family is adding a file: to this package, to a directory given to :func:`add_architectures` (the setting
``architectures`` of a migration), or to the one that ``LORASUITE_ARCHITECTURES`` names. Its fields are those of
:class:`~lorasuite.bases.Architecture`; an unknown field is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lorasuite.bases._architecture import Architecture
from lorasuite.bases._yaml import read_yaml
from lorasuite.errors import ArchitectureError, Problem, did_you_mean

#: Where the files of this package lie.
BUILT_IN = Path(__file__).parent / "architectures"
#: Environment variable: a directory of further files.
FOLDER = "LORASUITE_ARCHITECTURES"

#: libyaml's reader where PyYAML was built with it: ten times faster, and every command reads all the files.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

#: Directories given to :func:`add_architectures`, as absolute paths.
_added: list[Path] = []


@cache
def architectures() -> dict[str, Architecture]:
    """Every known family by model type: this package's, those of ``LORASUITE_ARCHITECTURES`` and those added.

    A file of the user's own goes before this package's.

    Raises:
        ArchitectureError: naming each file and field that is not valid, and each model type described twice.
    """
    found: dict[str, Architecture] = {}
    places: dict[str, Path] = {}
    problems: list[Problem] = []
    own = os.environ.get(FOLDER)
    folders = dict.fromkeys([BUILT_IN, *([Path(own).expanduser().absolute()] if own else []), *_added])
    for path in [file for folder in folders for file in sorted(folder.glob("*.yaml"))]:
        try:
            architecture = load(path)
        except ArchitectureError as error:
            problems.extend(error.problems)
            continue
        for model_type in architecture.model_types:
            if model_type in found and places[model_type].parent != BUILT_IN:
                what = f"model type {model_type!r} is already described by {places[model_type]}"
                problems.append(Problem(path.name, what, "Keep it in one file."))
            found[model_type], places[model_type] = architecture, path
    if problems:
        raise ArchitectureError(problems)
    return found


def add_architectures(folder: str | Path) -> None:
    """Know the families of a directory's YAML files, too, in this process; files changed since are read again.

    Adding a directory again changes nothing. One with a problem is not added: what was known stays known.

    Raises:
        ArchitectureError: if there is no such directory or no file in it; naming each file and field that is not
            valid, and each model type described twice.
    """
    path = Path(folder).expanduser().absolute()
    if not any(path.glob("*.yaml")):
        what = "holds no .yaml files" if path.is_dir() else "is no directory"
        raise ArchitectureError(Problem(str(folder), what, "Give a directory of architecture files."))
    if path not in _added:
        _added.append(path)
    architectures.cache_clear()
    try:
        architectures()
    except ArchitectureError:
        _added.remove(path)
        raise


def load(path: Path) -> Architecture:
    """Read and validate one architecture file.

    ``like: NAME`` takes every field but the notes that the file does not give from this package's ``NAME.yaml``.

    Raises:
        ArchitectureError: with one problem for each invalid field.
    """
    try:
        return Architecture.model_validate(_read(path))
    except ArchitectureError:
        raise
    except ValidationError as error:
        raise ArchitectureError(
            [
                Problem(
                    path.name,
                    f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}",
                    "See docs/architectures.md.",
                )
                for item in error.errors()
            ]
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = Problem(path.name, f"cannot be read ({error})", "See docs/architectures.md.")
        raise ArchitectureError(problem) from None


def _read(path: Path) -> Any:
    """A file's values, with those of the file that it is like."""
    own = path.parent != BUILT_IN
    values = read_yaml(path) if own else yaml.load(path.read_text(encoding="utf-8"), _LOADER)
    if isinstance(values, dict) and "like" in values:
        like = values.pop("like")
        known = sorted(file.stem for file in BUILT_IN.glob("*.yaml"))
        if like not in known:
            raise ArchitectureError(Problem(f"{path.name}: like", "is no file here", did_you_mean(str(like), known)))
        return {**_read(BUILT_IN / f"{like}.yaml"), "notes": "", **values}
    return values


def architecture_for(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """The family of a model's config, by its ``model_type``.

    Raises:
        ArchitectureError: for an unknown model type, with the nearest known ones.
    """
    if not isinstance(config.get("model_type"), str | None):
        raise ArchitectureError(Problem(f"{where}: model_type", "is no text", "Give the name of a family."))
    model_type = str(config.get("model_type") or _declared(config))
    known = architectures()
    if model_type in known:
        return known[model_type]
    raise ArchitectureError(
        Problem(
            where,
            f"unknown architecture model_type={model_type!r}",
            f"{did_you_mean(model_type, sorted(known))} A new family is one YAML file, of which `lorasuite inspect` "
            "proposes a draft (docs/architectures.md).",
        )
    )


def _declared(config: Mapping[str, Any]) -> str:
    """The family that a model with code of its own names its config module after, as MiniCPM's does: no model_type."""
    classes = config.get("auto_map")
    match = re.search(r"configuration_(\w+)\.", str(classes.get("AutoConfig", "") if isinstance(classes, dict) else ""))
    return match[1] if match else ""
