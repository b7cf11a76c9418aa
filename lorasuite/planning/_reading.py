"""Settings files: read, merged, their paths made absolute, and validated with every problem named at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lorasuite.bases import is_directory, read_yaml
from lorasuite.data import HUB
from lorasuite.errors import ConfigError, Problem, did_you_mean


class Strict(BaseModel):
    """Unknown fields are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def build(model: type[BaseModel], values: dict[str, Any], where: str = "settings") -> Any:
    """Validate values into a settings model.

    Raises:
        ConfigError: with one problem for each invalid field.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError([_problem(model, item, where) for item in error.errors()]) from None


def _problem(model: type[BaseModel], item: Any, where: str) -> Problem:
    path = ".".join(map(str, item["loc"])) or "settings"
    if item["type"] == "extra_forbidden":
        fields = list(model.model_fields)
        for part in item["loc"][:-1]:
            nested = model.model_fields.get(str(part))
            if nested is not None and isinstance(nested.annotation, type) and issubclass(nested.annotation, BaseModel):
                model, fields = nested.annotation, list(nested.annotation.model_fields)
        return Problem(f"{where}: {path}", "unknown setting", did_you_mean(str(item["loc"][-1]), fields))
    if item["type"] == "missing":
        flag = "--" + path.replace("_", "-")
        return Problem(f"{where}: {path}", "is required", f"Give {flag}, or {path}: in the --config file.")
    message = str(item["msg"]).removeprefix("Value error, ")
    got = repr(item.get("input"))
    return Problem(f"{where}: {path}", f"{message} (got {got if len(got) <= 80 else got[:79] + '…'})", "Fix the value.")


def read_config(path: Path) -> dict[str, Any]:
    """A YAML (or JSON) settings file as a mapping.

    Raises:
        ConfigError: if it is missing, not YAML, or not a mapping.
    """
    try:
        value = read_yaml(path)
    except FileNotFoundError:
        raise ConfigError(Problem(str(path), "no such file", "Check --config.")) from None
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(Problem(str(path), f"cannot be read ({why})", "Check it and its permissions.")) from None
    except ValueError as error:
        raise ConfigError(Problem(str(path), f"is not valid YAML ({error})", "Fix the file.")) from None
    if not isinstance(value, dict):
        raise ConfigError(Problem(str(path), "is not a mapping of settings", "Write `setting: value` lines."))
    return value


def located(source: str, folder: Path) -> str:
    """A directory relative to ``folder`` as an absolute path; anything else, a Hub id, as it is."""
    try:
        path = folder / Path(source).expanduser()
    except RuntimeError:  # the home of a user who is not there
        return source
    return str(path.absolute()) if is_directory(path) or source.startswith((".", "/", "~")) else source


def located_data(source: str, folder: Path) -> str:
    """A data file relative to ``folder`` as a path; a data set of the Hub as it is."""
    return source if source.startswith(HUB) else str(folder / Path(source).expanduser())


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of several files or flags: later ones over earlier ones, nested mappings setting by setting.

    Raises:
        ConfigError: where settings by name are given over something else, which would be lost without a word.
    """
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            before = result.get(key)
            if isinstance(before, Mapping) and isinstance(value, Mapping):
                value = merged(before, value)
            elif isinstance(value, Mapping) and before is not None:
                raise ConfigError(Problem(key, f"is {before!r}, and not settings by name", f"Write `{key}: {{...}}`."))
            result[key] = value
    return result
