"""Transforms by name: this package's, those of other packages, and those registered by hand.

A module of this package whose name has no leading underscore is a transform; adding one is adding such a file. Another
package names its own in the entry-point group ``lorasuite.transforms``::

    [project.entry-points."lorasuite.transforms"]
    mine = "my_package.my_module:Mine"
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from lorasuite.correspondence import MapKind
from lorasuite.errors import ConfigError, Problem, did_you_mean
from lorasuite.transforms._protocol import AlignedTransform, LayerTransform, ModelTransform

GROUP = "lorasuite.transforms"

AnyTransform = LayerTransform | ModelTransform
_Class = TypeVar("_Class", bound=type)

_REGISTRY: dict[str, AnyTransform] = {}


def register(cls: _Class) -> _Class:
    """Make a transform available by its name. Also a class decorator.

    Args:
        cls: a class without arguments whose instances are a :class:`LayerTransform` or a :class:`ModelTransform`.

    Raises:
        ConfigError: if it is neither, or another transform has its name.
    """
    where = f"{cls.__module__}.{cls.__qualname__}"
    made = cls()
    if not isinstance(made, LayerTransform | ModelTransform):
        what = "is neither a layer transform nor a model transform"
        raise ConfigError(Problem(where, what, "Derive it from lorasuite.transforms.LayerTransform or ModelTransform."))
    known = _REGISTRY.setdefault(made.name, made)
    if type(known) is not cls:
        what = f"is called {made.name!r}, as {type(known).__module__}.{type(known).__qualname__} is"
        raise ConfigError(Problem(where, what, "Give it another name."))
    return cls


@cache
def _load() -> None:
    """Import every transform of this package, and those that other packages name."""
    package = importlib.import_module("lorasuite.transforms")
    for found in pkgutil.iter_modules(package.__path__):
        if not found.name.startswith("_"):
            importlib.import_module(f"lorasuite.transforms.{found.name}")
    for entry in entry_points(group=GROUP):
        _load_entry(entry)


def _load_entry(entry: EntryPoint) -> None:
    """Register one transform of another package.

    Raises:
        ConfigError: if that package cannot be used, whatever its reason.
    """
    package = entry.dist.name if entry.dist is not None else entry.value
    try:
        register(entry.load())
    except Exception as error:
        what = f"its transform {entry.name!r} ({entry.value}) cannot be used: {error}"
        raise ConfigError(Problem(f"package {package}", what, "Repair that package, or uninstall it.")) from error


def transform(name: str) -> AnyTransform:
    """The transform of that name.

    Raises:
        ConfigError: for an unknown name, or a package whose transform cannot be used.
    """
    _load()
    if name not in _REGISTRY:
        raise ConfigError(Problem("method", f"unknown method {name!r}", did_you_mean(name, names(controls=True))))
    return _REGISTRY[name]


def map_kind(name: str) -> MapKind:
    """The kind of map of that name, among those that transforms declare.

    Raises:
        ConfigError: if none declares it, or two declare different ones.
    """
    _load()
    declared = [one.maps.values() for one in _REGISTRY.values() if isinstance(one, AlignedTransform)]
    found = {kind for kinds in declared for kind in kinds if kind.name == name}
    if len(found) != 1:
        what = f"is declared by {'no transform' if not found else 'transforms with different formulas'}"
        raise ConfigError(Problem(f"map {name!r}", what, "Give each kind of map a name of its own."))
    return found.pop()


def names(controls: bool = False) -> list[str]:
    """Every transform's name, sorted; the controls' only if asked for.

    Raises:
        ConfigError: if there is a package whose transform cannot be used.
    """
    _load()
    return sorted(name for name, found in _REGISTRY.items() if controls or not found.control)
