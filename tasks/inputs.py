"""A stage's inputs and settings: what its function's annotations ask for, and what a caller gave.

An input is a fingerprint (text), a reference to an earlier stage's artifact, or a group of references by name. The key
of the stage's own artifact hashes a fingerprint itself, a reference's key, and of a group each member as
``field.name``.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict

from artifacts import Artifact, Store


class Ref(BaseModel):
    """An artifact by name: which stage made it, and its key. Plain JSON, and no path."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    key: str


class StageSettings(BaseModel):
    """Base of the models of stages' settings; by itself that of a stage without any."""

    model_config = ConfigDict(extra="forbid", frozen=True)


#: What callers give for one input.
Input = str | Ref | Mapping[str, Ref] | None
#: The kinds of an input, and what they are called in messages.
KINDS = {"artifact": "an earlier stage's artifact", "text": "a fingerprint", "group": "artifacts by name"}


@dataclasses.dataclass(frozen=True)
class Models:
    """The models that a stage's function is annotated with; None where it takes a plain mapping."""

    inputs: type | None
    settings: type[BaseModel] | None

    @classmethod
    def of(cls, fn: Callable[..., Any]) -> Models:
        """Read from the annotations of ``fn(inputs, settings, where)``.

        Raises:
            TypeError: for an inputs model with a field that is no input, and for a settings model that takes unknown
                fields.
        """
        hints: dict[str, Any] = get_type_hints(fn)
        names = [*inspect.signature(fn).parameters, "", ""]
        first, second = hints.get(names[0]), hints.get(names[1])
        inputs = first if isinstance(first, type) and dataclasses.is_dataclass(first) else None
        settings = second if isinstance(second, type) and issubclass(second, BaseModel) else None
        if inputs is not None:
            _kinds(inputs)
        if settings is not None and settings.model_config.get("extra") != "forbid":
            raise TypeError(f"{settings.__name__} takes unknown settings: set extra='forbid' in its model_config")
        return cls(inputs, settings)

    def plain_settings(self, given: Mapping[str, Any] | BaseModel) -> dict[str, Any]:
        """Checked settings as JSON data, defaults included.

        Raises:
            ValidationError: where they do not fit the settings model.
        """
        if self.settings is not None and not isinstance(given, self.settings):
            given = self.settings.model_validate(given)
        return given.model_dump(mode="json") if isinstance(given, BaseModel) else dict(given)

    def plain_inputs(self, stage: str, given: Mapping[str, Input]) -> dict[str, Any]:
        """Checked inputs as JSON data. Optional ones that are None are left out.

        Raises:
            TypeError: naming every input of a typed stage that is unknown, missing or of another kind.
        """
        if self.inputs is not None:
            given = self._checked(self.inputs, stage, given)
        return {name: _plain(value) for name, value in given.items()}

    def _checked(self, model: type, stage: str, given: Mapping[str, Input]) -> dict[str, Input]:
        kinds, wrong = _kinds(model), []
        required = {
            f.name
            for f in dataclasses.fields(model)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        present = {name: value for name, value in given.items() if value is not None or name not in kinds}
        wrong += [f"{name!r} is not an input" for name in present if name not in kinds]
        wrong += [f"{name!r} is missing" for name in kinds if name in required and name not in present]
        for name, value in present.items():
            if name in kinds and _kind(value) not in kinds[name]:
                wanted = " or ".join(KINDS[kind] for kind in sorted(kinds[name]))
                wrong.append(f"{name!r} needs {wanted}, not {value!r}")
        if wrong:
            raise TypeError(f"inputs of stage {stage!r}: {'; '.join(wrong)}. It takes {', '.join(kinds)}")
        return present

    def resolve(self, store: Store, plain: Mapping[str, Any]) -> Any:
        """What the function gets: fingerprints as they are, references as opened and verified artifacts.

        Raises:
            ArtifactMissing, ArtifactDamaged: where a reference's artifact cannot be used.
        """
        opened = {name: _resolve(store, value) for name, value in plain.items()}
        return opened if self.inputs is None else self.inputs(**opened)

    def parse(self, settings: dict[str, Any]) -> Any:
        """Plain settings as what the function gets."""
        return settings if self.settings is None else self.settings.model_validate(settings)


def input_fingerprints(inputs: Mapping[str, Any]) -> dict[str, str]:
    """What inputs contribute to the key, by name; a group's members by ``field.name``."""
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        ref = _reference(value)
        if ref is not None:
            found[name] = ref.key
        elif isinstance(value, Mapping):
            found |= {f"{name}.{member}": key for member, key in input_fingerprints(value).items()}
        else:
            found[name] = value
    return found


def _kinds(model: type) -> dict[str, frozenset[str]]:
    """Which kinds of input each field of an inputs model takes.

    Raises:
        TypeError: for a field of another type.
    """
    hints, found = get_type_hints(model), {}
    for field in dataclasses.fields(model):
        hint = hints[field.name]
        options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        kinds = {
            "artifact" if option is Artifact else "text" if option is str else "group"
            for option in options
            if option in (Artifact, str) or (get_origin(option) is dict and get_args(option) == (str, Artifact))
        }
        if len(kinds) != sum(option is not types.NoneType for option in options) or not kinds:
            raise TypeError(f"{model.__name__}.{field.name} is {hint}: use Artifact, str or dict[str, Artifact]")
        found[field.name] = frozenset(kinds)
    return found


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    if _reference(value) is not None:
        return "artifact"
    grouped = isinstance(value, Mapping) and all(isinstance(k, str) and _reference(v) for k, v in value.items())
    return "group" if grouped else None


def _reference(value: Any) -> Ref | None:
    """A reference, given as such or as JSON data; None for anything else."""
    if isinstance(value, Ref):
        return value
    if isinstance(value, Mapping) and value.keys() == {"stage", "key"} and isinstance(value["key"], str):
        return Ref.model_validate(value)
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, Ref):
        return value.model_dump()
    return {name: _plain(member) for name, member in value.items()} if isinstance(value, Mapping) else value


def _resolve(store: Store, value: Any) -> Any:
    ref = _reference(value)
    if ref is not None:
        return store.open(ref.key)
    return {name: _resolve(store, member) for name, member in value.items()} if isinstance(value, Mapping) else value
