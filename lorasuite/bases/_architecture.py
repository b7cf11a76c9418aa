"""What is known of one model family: its dimensions, its modules and how several projections share a weight.

``docs/architectures.md`` explains the fields of :class:`Architecture`, which are those of its YAML file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from lorasuite.errors import ArchitectureError, Problem

#: The projections of a transformer block that most families have: softmax attention's and the MLP's.
StandardRole = Literal["q", "k", "v", "o", "gate", "up", "down"]
#: What a projection does in a block, whatever a family calls it: a standard role, or one that an architecture file
#: names itself (``linear_qkv``, ``kv_latent``). Two families that use one name mean the same by it.
Role = str
ROLES: tuple[Role, ...] = get_args(StandardRole)
ATTENTION: tuple[Role, ...] = ("q", "k", "v", "o")
MLP: tuple[Role, ...] = ("gate", "up", "down")

#: How several roles share one weight, along its output axis:
#: ``plain`` one role; ``interleaved`` head by head (q₀ k₀ v₀ q₁ k₁ v₁ …); ``stacked`` role after role.
Layout = Literal["plain", "interleaved", "stacked"]


#: Numbers that can be read from the shapes of a layer's weights.
Measured = Literal["head_dim", "kv_heads", "intermediate_size"]


@dataclass(frozen=True)
class Dimensions:
    """The numbers by which two bases differ (the paper's upgrade factors, section 2.1), and the head size.

    ``own`` has ``(role, out, in)`` of the roles of one layer that are no standard ones, as its checkpoint has them.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    own: tuple[tuple[Role, int, int], ...] = ()

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
        own = next((out for name, out, _ in self.own if name == role), None)
        if own is not None:
            return own
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
        own = next((inside for name, _, inside in self.own if name == role), None)
        if own is not None:
            return own
        return {"o": self.heads * self.head_dim, "down": self.intermediate_size}.get(role, self.hidden_size)


#: Reasons of :attr:`Architecture.refused` that several families have, by the word that stands for each.
REASONS = {
    "router": "a router's outputs number the experts of its own base",
    "experts": (
        "expert weights are not mapped: one expert of the old base has no known counterpart among the new base's (and "
        "transformers 5 keeps the experts of a layer as one 3-D parameter, not as linear modules). Train it without "
        "its experts, or fine-tune a fresh adapter of the new base on what the old base writes with this one."
    ),
}

#: What the names of a language model's modules begin with: in its own class, in multimodal ones (from transformers 4.52
#: on, and before), and in the bare stack of blocks. Checkpoints and adapters may have any of them.
STACKS = ("model.language_model.", "language_model.model.", "language_model.", "model.text_model.", "model.", "")
#: The same of the output embedding.
HEADS = ("lm_head", "language_model.lm_head", "model.lm_head")

#: The numbers a config gives.
NUMBERS = tuple(f.name for f in fields(Dimensions) if f.name != "own")


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
    ``roles``: standard ones, or at most one of the family's own, whose size is what the checkpoint leaves for it.
    ``optional``: only some layers have it (attention among linear attention, dense layers among mixtures of experts);
    the checkpoint says which. ``apart``: it may be absent where other optional ones below its parent are not.
    ``intermediate_size``: where the config keeps this module's own MLP width, if it is not the family's.
    """

    name: str
    roles: tuple[Role, ...] = Field(min_length=1)
    layout: Layout = "plain"
    transposed: bool = False
    optional: bool = False
    apart: bool = False
    intermediate_size: Sources = ()

    @model_validator(mode="after")
    def _layout_fits(self) -> Module:
        if (self.layout == "plain") != (len(self.roles) == 1):
            raise ValueError(f"module {self.name}: layout {self.layout!r} does not fit roles {self.roles}")
        if len(self.own_roles) > 1:
            raise ValueError(f"module {self.name}: {' and '.join(self.own_roles)} are both no standard roles")
        return self

    @property
    def own_roles(self) -> tuple[Role, ...]:
        """Its roles that are no standard ones: one at most."""
        return tuple(role for role in self.roles if role not in ROLES)

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

    ``measured`` are numbers that layers need not share, and that are read from each layer's weights.
    ``own_roles`` names the roles that are no standard ones, and says what each is.
    ``config`` maps each field of :class:`Dimensions` to the config keys tried in order (or to a :class:`Multiple`).
    ``defaults`` are values of the family's config class that a ``config.json`` may leave out.
    ``text_config`` is the key under which a multimodal config keeps its language model's.
    ``embedding_scale`` is the factor, if any, between the embedding's rows and what the first block reads.
    ``aliases`` maps the start of a name to what checkpoints or adapters may write instead.
    ``refused`` maps the start of a module's name below the layer to why an adapter of it is not migrated: a sentence,
    or a word of :data:`REASONS`.
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
    measured: tuple[Measured, ...] = ()
    own_roles: dict[Role, str] = {}
    aliases: dict[str, tuple[str, ...]] = {}
    refused: dict[str, str] = {}
    notes: str = ""

    @field_validator("config")
    @classmethod
    def _config_names_every_dimension(cls, value: dict[str, Sources]) -> dict[str, Sources]:
        wanted = set(NUMBERS)
        if set(value) != wanted:
            raise ValueError(f"config must name exactly {sorted(wanted)}, got {sorted(value)}")
        return value

    @model_validator(mode="after")
    def _roles_appear_once(self) -> Architecture:
        used = [role for module in self.modules for role in module.own_roles]
        if unknown := [role for role in used if role not in self.own_roles]:
            raise ValueError(f"roles {unknown} are neither {', '.join(ROLES)} nor among own_roles")
        for role in self.roles:
            holders = [module for module in self.modules if role in module.roles]
            if len(holders) > 1 and not all(module.optional for module in holders):
                raise ValueError(f"role {role} belongs to more than one module, and not all of them are optional")
        return self

    @property
    def roles(self) -> tuple[Role, ...]:
        """Every role the family's blocks may have: the standard ones first."""
        return in_order(role for module in self.modules for role in module.roles)

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
        for starts in (STACKS, HEADS):
            known = next((one for one in starts if one and name.startswith(one)), None)
            if known is not None:
                yield from (other + name.removeprefix(known) for other in starts if other != known)
                return

    def own_name(self, name: str) -> str:
        """The family's own name of what may be called otherwise in a checkpoint or an adapter."""
        found = self._split(name)
        if found is not None:
            return f"{self.layers}.{found[0]}.{found[1]}"
        for known in (self.embedding, self.unembedding):
            for other in self.names(known):
                if name == other or name.startswith(f"{other}."):
                    return known + name.removeprefix(other)
        return name

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
        why = next((why for start, why in self.refused.items() if f"{found[1]}.".startswith(f"{start}.")), "")
        return REASONS.get(why, why)

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

    def widths(self, dims: Dimensions, layer: int, modules: Iterable[Module], config: Mapping[str, Any]) -> Dimensions:
        """The dimensions of a layer that has these modules: with its modules' MLP width, or its place's in a list."""
        own = [source for module in modules for source in module.intermediate_size]
        sources = (*own, *self.config["intermediate_size"])
        width = _number(sources, {**asdict(dims), **self.settings(config)}, layer)
        return dims if width is None else replace(dims, intermediate_size=int(width))

    def dimensions(self, config: Mapping[str, Any], where: str = "config.json") -> Dimensions:
        """Read the numbers from a model's config.

        Raises:
            ArchitectureError: naming every number the config lacks.
        """
        settings = self.settings(config)
        found: dict[str, Any] = {}
        problems: list[Problem] = []
        for name, sources in self.config.items():
            value = _number(sources, {**settings, **found})
            if value is None and name == "head_dim" and {"hidden_size", "heads"} <= found.keys():
                given = [settings.get(source) for source in sources if isinstance(source, str)]
                if not any(isinstance(number, int | float) and number < 0 for number in given):  # transformers takes it
                    value = found["hidden_size"] // found["heads"]
            if value is None:
                keys = " or ".join(map(str, sources))
                problems.append(
                    Problem(where, f"no usable {name} (looked for {keys})", f"Add it, or fix {self.family}.yaml.")
                )
                continue
            if not value <= LARGEST or value != int(value):
                what = f"{name} is {value!r}"
                problems.append(Problem(where, what, f"It must be a whole number, at most {LARGEST}."))
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


#: No model has a dimension beyond; checks go through one layer after the other.
LARGEST = 2**31 - 1


def in_order(roles: Iterable[Role]) -> tuple[Role, ...]:
    """Roles once each: the standard ones in their order, then the others as they come."""
    found = dict.fromkeys(roles)
    return (*(role for role in ROLES if role in found), *(role for role in found if role not in ROLES))


def _number(sources: Sources, settings: Mapping[str, Any], layer: int = 0) -> float | None:
    """The first positive number among the sources; of a list with one for each layer, that layer's."""
    for source in sources:
        value = settings.get(source if isinstance(source, str) else source.of)
        if isinstance(value, list | tuple) and layer < len(value):
            value = value[layer]
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return value if isinstance(source, str) else source.times * float(value) ** source.power
    return None
