"""What lorasuite knows of each model family, as validated data: one YAML file a family in this directory.

Adding an architecture is adding a file. Its fields are those of :class:`Architecture`; an unknown field is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from lorasuite.errors import ArchitectureError, Problem, did_you_mean

#: What a projection does in a transformer block, whatever a family calls it.
Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
ROLES: tuple[Role, ...] = get_args(Role)
ATTENTION: tuple[Role, ...] = ("q", "k", "v", "o")

#: How several roles share one weight, along its output axis:
#: ``plain`` one role; ``interleaved`` head by head (q₀ k₀ v₀ q₁ k₁ v₁ …); ``stacked`` role after role.
Layout = Literal["plain", "interleaved", "stacked"]


@dataclass(frozen=True)
class Dimensions:
    """The numbers of METHOD's six explicit upgrade factors, and the head size."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def attention(self) -> str:
        """``MHA``, ``GQA`` or ``MQA``."""
        if self.kv_heads == self.heads:
            return "MHA"
        return "MQA" if self.kv_heads == 1 else "GQA"

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    def rows(self, role: Role) -> int:
        """Output features of a role's weight."""
        return {
            "q": self.heads * self.head_dim,
            "k": self.kv_heads * self.head_dim,
            "v": self.kv_heads * self.head_dim,
            "o": self.hidden_size,
            "gate": self.intermediate_size,
            "up": self.intermediate_size,
            "down": self.hidden_size,
        }[role]

    def columns(self, role: Role) -> int:
        """Input features of a role's weight."""
        return {"o": self.heads * self.head_dim, "down": self.intermediate_size}.get(role, self.hidden_size)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Multiple(_Strict):
    """A number the config leaves out: ``times`` the value of another field (Bloom's 4·hidden MLP)."""

    of: str
    times: float = 1.0


class Module(_Strict):
    """One linear module of a block: its path below the layer, the roles it holds and how they share its rows."""

    name: str
    roles: tuple[Role, ...] = Field(min_length=1)
    layout: Layout = "plain"

    @model_validator(mode="after")
    def _layout_fits(self) -> Module:
        if (self.layout == "plain") != (len(self.roles) == 1):
            raise ValueError(f"module {self.name}: layout {self.layout!r} does not fit roles {self.roles}")
        return self

    def split(self, rows: Tensor, dims: Dimensions) -> dict[Role, Tensor]:
        """Split a fused weight, bias or ``B`` factor along its first axis into roles (views where possible)."""
        if self.layout == "plain":
            return {self.roles[0]: rows}
        if self.layout == "interleaved":
            e = dims.head_dim
            blocks = rows.reshape(dims.heads, len(self.roles), e, *rows.shape[1:])
            return {role: blocks[:, n].reshape(dims.heads * e, *rows.shape[1:]) for n, role in enumerate(self.roles)}
        parts = rows.split([dims.rows(role) for role in self.roles])
        return dict(zip(self.roles, parts, strict=True))

    def fuse(self, parts: Mapping[Role, Tensor], dims: Dimensions) -> Tensor:
        """The inverse of :meth:`split`: every role of the module must be given."""
        if self.layout == "plain":
            return parts[self.roles[0]]
        ordered = [parts[role] for role in self.roles]
        if self.layout == "interleaved":
            tail = ordered[0].shape[1:]
            heads = [part.reshape(dims.heads, dims.head_dim, *tail) for part in ordered]
            return torch.stack(heads, 1).reshape(dims.heads * len(self.roles) * dims.head_dim, *tail)
        return torch.cat(ordered)


class Architecture(_Strict):
    """One family: where its config keeps each number and what its modules are called.

    ``config`` maps each field of :class:`Dimensions` to the config keys tried in order (or to a :class:`Multiple`).
    ``optional_prefix`` is a module prefix that checkpoints of the family may leave out of tensor names.
    """

    family: str
    model_types: tuple[str, ...] = Field(min_length=1)
    config: dict[str, tuple[str | Multiple, ...]]
    embedding: str
    unembedding: str
    layers: str
    modules: tuple[Module, ...]
    optional_prefix: str = ""
    notes: str = ""

    @field_validator("config")
    @classmethod
    def _config_names_every_dimension(
        cls, value: dict[str, tuple[str | Multiple, ...]]
    ) -> dict[str, tuple[str | Multiple, ...]]:
        wanted = {f.name for f in fields(Dimensions)}
        if set(value) != wanted:
            raise ValueError(f"config must name exactly {sorted(wanted)}, got {sorted(value)}")
        return value

    @model_validator(mode="after")
    def _roles_appear_once(self) -> Architecture:
        roles = [role for module in self.modules for role in module.roles]
        if len(roles) != len(set(roles)):
            raise ValueError("a role belongs to more than one module")
        return self

    @property
    def roles(self) -> tuple[Role, ...]:
        """Every role the family's blocks have."""
        return tuple(role for role in ROLES if any(role in module.roles for module in self.modules))

    def module(self, role: Role) -> Module | None:
        """The module that holds a role, or None where blocks have no such projection."""
        return next((module for module in self.modules if role in module.roles), None)

    def path(self, layer: int, module: Module) -> str:
        """Full module path in the transformers model, e.g. ``model.layers.3.self_attn.q_proj``."""
        return f"{self.layers}.{layer}.{module.name}"

    def locate(self, path: str) -> tuple[int, Module] | None:
        """The layer and module of a full module path, or None where the file does not describe it."""
        match = re.fullmatch(re.escape(self.layers) + r"\.(\d+)\.(.+)", path)
        if match is None:
            return None
        module = next((m for m in self.modules if m.name == match[2]), None)
        return None if module is None else (int(match[1]), module)

    def dimensions(self, config: Mapping[str, Any], where: str = "config.json") -> Dimensions:
        """Read the numbers from a model's config.

        Raises:
            ArchitectureError: naming every number the config lacks.
        """
        found: dict[str, int] = {}
        problems: list[Problem] = []
        for name, sources in self.config.items():
            for source in sources:
                value: Any
                if isinstance(source, Multiple):
                    base = found.get(source.of, config.get(source.of))
                    value = None if base is None else base * source.times
                else:
                    value = config.get(source)
                if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                    found[name] = int(value)
                    break
            else:
                if name == "head_dim" and {"hidden_size", "heads"} <= found.keys():
                    found[name] = found["hidden_size"] // found["heads"]
                    continue
                keys = " or ".join(s if isinstance(s, str) else f"{s.times}·{s.of}" for s in sources)
                problems.append(
                    Problem(where, f"no usable {name} (looked for {keys})", f"Add it, or fix {self.family}.yaml.")
                )
        if problems:
            raise ArchitectureError(problems)
        dims = Dimensions(**found)
        if dims.heads % dims.kv_heads:
            raise ArchitectureError(
                Problem(
                    where,
                    f"{dims.heads} heads do not divide into {dims.kv_heads} key/value heads",
                    "Check num_attention_heads and num_key_value_heads.",
                )
            )
        return dims


@cache
def architectures() -> dict[str, Architecture]:
    """Every known family by model type, from the YAML files beside this module.

    Raises:
        ArchitectureError: naming each file and field that is not valid.
    """
    found: dict[str, Architecture] = {}
    problems: list[Problem] = []
    for path in sorted(Path(__file__).parent.glob("*.yaml")):
        try:
            architecture = load(path)
        except ArchitectureError as error:
            problems.extend(error.problems)
            continue
        for model_type in architecture.model_types:
            if model_type in found:
                problems.append(
                    Problem(
                        path.name,
                        f"model type {model_type!r} is already described by {found[model_type].family}.yaml",
                        "Keep it in one file.",
                    )
                )
            found[model_type] = architecture
    if problems:
        raise ArchitectureError(problems)
    return found


def load(path: Path) -> Architecture:
    """Read and validate one architecture file.

    Raises:
        ArchitectureError: with one problem for each invalid field.
    """
    try:
        return Architecture.model_validate(yaml.safe_load(path.read_text()))
    except ValidationError as error:
        raise ArchitectureError(
            [
                Problem(
                    path.name,
                    f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}",
                    "See docs for adding an architecture.",
                )
                for item in error.errors()
            ]
        ) from None


def architecture_for(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """The family of a model's config, by its ``model_type``.

    Raises:
        ArchitectureError: for an unknown model type, with the nearest known ones.
    """
    model_type = str(config.get("model_type", ""))
    known = architectures()
    if model_type in known:
        return known[model_type]
    raise ArchitectureError(
        Problem(
            where,
            f"unknown architecture model_type={model_type!r}",
            f"{did_you_mean(model_type, sorted(known))} A new family is one YAML file in lorasuite/architectures.",
        )
    )
