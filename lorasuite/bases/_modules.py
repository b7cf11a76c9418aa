"""The modules of a block and the numbers of a model, as architecture files and their readers name them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

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


class Strict(BaseModel):
    """A part of an architecture file: of no other fields than its own, and never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Multiple(Strict):
    """A number the config leaves out: ``times · of ** power`` of another field (Bloom's 4·hidden MLP)."""

    of: str
    times: float = 1.0
    power: float = 1.0

    def __str__(self) -> str:
        """As messages show it: ``4·hidden_size``."""
        return f"{self.times:g}·{self.of}" + (f"^{self.power:g}" if self.power != 1 else "")


#: Where a number is found: config keys, or multiples of other numbers, tried in order.
Sources = tuple[str | Multiple, ...]


class Module(Strict):
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


#: A fused parameter of experts, as transformers keeps it: ``(experts, gate and up, in)``.
GATE_UP = Module(name="gate_up_proj", roles=("gate", "up"), layout="stacked")
DOWN = Module(name="down_proj", roles=("down",))


class Experts(Strict):
    """The routed experts of a mixture, each a gated MLP: where they are, and how many and how wide they are.

    ``path``: below the layer, in the transformers model, which keeps them as the 3-D parameters :data:`GATE_UP` and
    :data:`DOWN`. ``others``: what checkpoints and adapters may have instead. ``names``: what the projections of one
    expert are called there.
    """

    path: str
    others: tuple[str, ...] = ()
    count: Sources
    intermediate_size: Sources
    names: dict[StandardRole, str] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

    def own_name(self, name: str) -> str:
        """What transformers calls a module of the mixture, by a name that it has elsewhere below the layer."""
        own = self.path.rpartition(".")[0]
        for other in (place.rpartition(".")[0] for place in self.others):
            if name.startswith(f"{other}."):
                return own + name.removeprefix(other)
        return name

    def locate(self, name: str) -> tuple[int, Module] | None:
        """The number of an expert and the module of a name below the layer: one projection of it, or its part of a
        fused parameter."""
        places = "|".join(re.escape(place) for place in (self.path, *self.others))
        match = re.fullmatch(rf"(?:{places})\.(\d+)\.(\w+)", name)
        known = {DOWN.name: DOWN, GATE_UP.name: GATE_UP}
        known |= {own: Module(name=own, roles=(role,)) for role, own in self.names.items()}
        return (int(match[1]), known[match[2]]) if match and match[2] in known else None
