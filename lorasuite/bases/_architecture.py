"""What is known of one model family: its dimensions, its modules and how several projections share a weight.

``docs/architectures.md`` explains the fields of :class:`Architecture`, which are those of its YAML file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from lorasuite.errors import ArchitectureError, Problem

#: What a projection does in a transformer block, whatever a family calls it.
Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
ROLES: tuple[Role, ...] = get_args(Role)
ATTENTION: tuple[Role, ...] = ("q", "k", "v", "o")

#: How several roles share one weight, along its output axis:
#: ``plain`` one role; ``interleaved`` head by head (q₀ k₀ v₀ q₁ k₁ v₁ …); ``stacked`` role after role.
Layout = Literal["plain", "interleaved", "stacked"]


@dataclass(frozen=True)
class Dimensions:
    """The numbers by which two bases differ (the paper's upgrade factors, section 2.1), and the head size."""

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
    """A number the config leaves out: ``times · of ** power`` of another field (Bloom's 4·hidden MLP)."""

    of: str
    times: float = 1.0
    power: float = 1.0

    def __str__(self) -> str:
        """As messages show it: ``4·hidden_size``."""
        return f"{self.times:g}·{self.of}" + (f"^{self.power:g}" if self.power != 1 else "")


#: Where a number is found: config keys, or multiples of other numbers, tried in order.
Sources = tuple[str | Multiple, ...]


class Module(_Strict):
    """One linear module of a block: its path below the layer, the roles it holds and how they share its rows.

    ``transposed``: the weight is stored ``(in, out)``, as transformers' ``Conv1D`` does.
    ``optional``: only some layers have it (mixture-of-experts layers among dense ones); the checkpoint says which.
    ``intermediate_size``: where the config keeps this module's own MLP width, if it is not the family's.
    """

    name: str
    roles: tuple[Role, ...] = Field(min_length=1)
    layout: Layout = "plain"
    transposed: bool = False
    optional: bool = False
    intermediate_size: Sources = ()

    @model_validator(mode="after")
    def _layout_fits(self) -> Module:
        if (self.layout == "plain") != (len(self.roles) == 1):
            raise ValueError(f"module {self.name}: layout {self.layout!r} does not fit roles {self.roles}")
        return self

    def split(self, rows: Tensor, dims: Dimensions) -> dict[Role, Tensor]:
        """Split a fused weight ``(out, in)``, bias ``(out,)`` or factor ``B (out, r)`` into its roles (views)."""
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

    Names are those of the model that transformers builds, as PEFT writes them.

    ``config`` maps each field of :class:`Dimensions` to the config keys tried in order (or to a :class:`Multiple`).
    ``defaults`` are values of the family's config class that a ``config.json`` may leave out.
    ``text_config`` is the key under which a multimodal config keeps its language model's.
    ``embedding_scale`` is the factor, if any, between the embedding's rows and what the first block reads.
    ``aliases`` maps the start of a name to what checkpoints or adapters may write instead.
    ``refused`` maps the start of a module's name below the layer to why an adapter of it is not migrated.
    """

    family: str
    model_types: tuple[str, ...] = Field(min_length=1)
    config: dict[str, Sources]
    defaults: dict[str, Any] = {}
    text_config: str = ""
    embedding: str
    embedding_scale: Sources = ()
    unembedding: str
    layers: str
    modules: tuple[Module, ...]
    aliases: dict[str, tuple[str, ...]] = {}
    refused: dict[str, str] = {}
    notes: str = ""

    @field_validator("config")
    @classmethod
    def _config_names_every_dimension(cls, value: dict[str, Sources]) -> dict[str, Sources]:
        wanted = {f.name for f in fields(Dimensions)}
        if set(value) != wanted:
            raise ValueError(f"config must name exactly {sorted(wanted)}, got {sorted(value)}")
        return value

    @model_validator(mode="after")
    def _roles_appear_once(self) -> Architecture:
        for role in ROLES:
            holders = [module for module in self.modules if role in module.roles]
            if len(holders) > 1 and not all(module.optional for module in holders):
                raise ValueError(f"role {role} belongs to more than one module, and not all of them are optional")
        return self

    @property
    def roles(self) -> tuple[Role, ...]:
        """Every role the family's blocks may have."""
        return tuple(role for role in ROLES if any(role in module.roles for module in self.modules))

    def module(self, role: Role) -> Module | None:
        """The first module that holds a role, or None where blocks have no such projection."""
        return next((module for module in self.modules if role in module.roles), None)

    def path(self, layer: int, module: Module) -> str:
        """Full module path in the transformers model, e.g. ``model.layers.3.self_attn.q_proj``."""
        return f"{self.layers}.{layer}.{module.name}"

    def names(self, name: str) -> Iterator[str]:
        """A tensor's name and those it may have instead."""
        yield name
        for start, others in self.aliases.items():
            if name.startswith(start):
                yield from (other + name.removeprefix(start) for other in others)

    def locate(self, path: str) -> tuple[int, Module] | None:
        """The layer and module of a full module path, or None where the file does not describe it."""
        found = self._split(path)
        module = found and next((m for m in self.modules if m.name == found[1]), None)
        return (found[0], module) if found and module else None

    def refusal(self, path: str) -> str:
        """Why the file says that updates of this module are not migrated; empty if it does not name it."""
        found = self._split(path)
        if found is None:
            return ""
        return next((why for start, why in self.refused.items() if f"{found[1]}.".startswith(f"{start}.")), "")

    def _split(self, path: str) -> tuple[int, str] | None:
        """The layer and the name below it, of a path under any of the layer stack's names."""
        stacks = dict.fromkeys(self.names(self.layers + "."))
        match = next((m for stack in stacks if (m := re.fullmatch(re.escape(stack) + r"(\d+)\.(.+)", path))), None)
        return None if match is None else (int(match[1]), match[2])

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The language model's settings of a model's config, with the family's defaults where it says nothing."""
        nested = config.get(self.text_config) if self.text_config else None
        return {**self.defaults, **config, **(nested if isinstance(nested, Mapping) else {})}

    def tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the input embedding is the output one, too."""
        return bool({**self.settings(config), **config}.get("tie_word_embeddings"))

    def scale(self, config: Mapping[str, Any]) -> float:
        """What the embedding's rows are multiplied with before the first block."""
        return _number(self.embedding_scale, self.settings(config)) or 1.0

    def widths(self, dims: Dimensions, modules: Iterable[Module], config: Mapping[str, Any]) -> Dimensions:
        """The dimensions of a layer that has these modules: with their own MLP width where they have one."""
        for module in modules:
            width = _number(module.intermediate_size, self.settings(config))
            if width is not None:
                return replace(dims, intermediate_size=int(width))
        return dims

    def dimensions(self, config: Mapping[str, Any], where: str = "config.json") -> Dimensions:
        """Read the numbers from a model's config.

        Raises:
            ArchitectureError: naming every number the config lacks.
        """
        settings = self.settings(config)
        found: dict[str, int] = {}
        problems: list[Problem] = []
        for name, sources in self.config.items():
            value = _number(sources, {**settings, **found})
            if value is None and name == "head_dim" and {"hidden_size", "heads"} <= found.keys():
                value = found["hidden_size"] // found["heads"]
            if value is None:
                keys = " or ".join(map(str, sources))
                problems.append(
                    Problem(where, f"no usable {name} (looked for {keys})", f"Add it, or fix {self.family}.yaml.")
                )
                continue
            found[name] = int(value)
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


def _number(sources: Sources, settings: Mapping[str, Any]) -> float | None:
    """The first positive number among the sources."""
    for source in sources:
        value = settings.get(source if isinstance(source, str) else source.of)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return value if isinstance(source, str) else source.times * float(value) ** source.power
    return None
