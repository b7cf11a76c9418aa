"""Command-line options derived from settings models, so that help and validation never drift apart."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.markup import escape

from lorasuite.planning import FIRST, HEADINGS, heading_of

#: Nested settings whose flags carry their name; those of the pair and of loading stand alone.
PREFIX = {
    "loading": "",
    "pair": "",
    "finetune": "finetune_",
    "teacher": "teacher_",
    "evaluation": "evaluation_",
    "general": "general_",
    "gate": "gate_",
}


def flags(model: type[BaseModel], prefix: str = "", path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any, FieldInfo]]:
    """Every setting as ``(parameter name, path in the model, field)``, nested models flattened."""
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from flags(annotation, PREFIX[name], (*path, name))
        elif typing.get_origin(annotation) is dict:  # settings files alone can say it
            continue
        else:
            yield prefix + name, (*path, name), info


def with_settings(
    model: type[BaseModel], only: tuple[str, ...] | None = None, heading: str | None = None
) -> Callable[[Any], Any]:
    """Decorator: give a command one option for every setting of ``model``; they arrive as ``values: dict``.

    A flag left out is left out of ``values`` too, so that it does not override a ``--config`` file.

    Args:
        only: the parameter names wanted; all of them if None.
        heading: the heading of all in ``--help``; if None that of each setting of a migration.
    """
    table = {p: (path, info) for p, path, info in flags(model) if only is None or p in only}

    def decorate(function: Any) -> Any:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "values"]

        def command(**given: Any) -> Any:
            values: dict[str, Any] = {}
            for parameter, (path, info) in table.items():
                value = given.pop(parameter)
                if value is None:
                    continue
                where = values
                for part in path[:-1]:
                    where = where.setdefault(part, {})
                where[path[-1]] = _parse(value, info)
            return function(values=values, **given)

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        options = [
            inspect.Parameter(
                parameter,
                inspect.Parameter.KEYWORD_ONLY,
                default=typer.Option(
                    None,
                    _declaration(parameter, info),
                    help=escape(_help(info)),
                    show_default=False,
                    rich_help_panel=heading or heading_of(path[0]),
                ),
                annotation=_scalar(info.annotation) | None,
            )
            for parameter, (path, info) in sorted(table.items(), key=_place)
        ]
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        command.__signature__ = inspect.Signature([*options, *own])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [*options, *own]}
        return command

    return decorate


def _place(entry: tuple[str, tuple[tuple[str, ...], FieldInfo]]) -> int:
    """What everyone needs first, then heading by heading; within one, settings in the order they are declared."""
    name = entry[1][0][0]
    order = [*FIRST, *(name for names in HEADINGS.values() for name in names)]
    return order.index(name) if name in order else len(order)


def _declaration(parameter: str, info: FieldInfo) -> str:
    flag = "--" + parameter.replace("_", "-")
    return f"{flag}/--no-{flag[2:]}" if _scalar(info.annotation) is bool else flag


def _scalar(annotation: Any) -> Any:
    """The type a flag is parsed as: lists arrive as comma-separated text, literals as text."""
    options = [a for a in typing.get_args(annotation) if a is not types.NoneType]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return _scalar(options[0])
    return annotation if annotation in (int, float, bool) else str


def _parse(value: Any, info: FieldInfo) -> Any:
    if typing.get_origin(info.annotation) is tuple:
        return [part.strip() for part in str(value).split(",") if part.strip()]
    return value


def _help(info: FieldInfo) -> str:
    text = info.description or ""
    choices = typing.get_args(info.annotation) if typing.get_origin(info.annotation) is typing.Literal else ()
    if choices and not all(str(choice) in text for choice in choices):
        text += f" ({', '.join(map(str, choices))})"
    if typing.get_origin(info.annotation) is tuple:
        text += " (comma-separated)"
    if not info.is_required() and info.default not in (None, ()):
        text += f" [default: {info.default}]"
    return text.strip()
