"""What is known of one model family: its dimensions, its modules and how several projections share a weight.

``docs/architectures.md`` explains the fields of :class:`Architecture`, which are those of its YAML file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lorasuite.bases._modules import ROLES, Dimensions, Experts, Measured, Module, Role, Sources
from lorasuite.errors import ArchitectureError, Problem

#: Reasons of :attr:`Architecture.refused` that several families have, by the word that stands for each.
REASONS = {
    "router": "a router's outputs number the experts of its own base",
    "experts": "the experts of this family are not mapped, for its architecture file does not describe them",
    "dense": "PEFT takes gate_proj, up_proj and down_proj of this family for its experts",
    "state_space": "PEFT adapts no output projection of a state space in this family",
}
#: Those of modules that PEFT adapts as parameters and not as linear modules.
AS_PARAMETERS = ("router", "dense")
#: Those of modules that PEFT does not adapt at all.
NOT_BY_PEFT = ("state_space",)

#: What the names of a language model's modules begin with: in its own class, in multimodal ones (from transformers 4.52
#: on, and before), and in the bare stack of blocks. Checkpoints and adapters may have any of them.
STACKS = ("model.language_model.", "language_model.model.", "language_model.", "model.text_model.", "model.", "")
#: The same of the output embedding.
HEADS = ("lm_head", "language_model.lm_head", "model.lm_head")

#: The numbers a config gives.
NUMBERS = tuple(f.name for f in fields(Dimensions) if f.name != "own")


class Architecture(BaseModel):
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
    or a word of :data:`REASONS`. ``experts`` describes those of a mixture.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

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
    experts: Experts | None = None
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
            below = found[1] if self.experts is None else self.experts.own_name(found[1])
            return f"{self.layers}.{found[0]}.{below}"
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

    def locate_expert(self, path: str) -> tuple[int, int, Module] | None:
        """The layer, the expert and the module of a full path below a layer's experts, or None for another one."""
        found = self._split(path) if self.experts is not None else None
        inside = found and self.experts and self.experts.locate(found[1])
        return (found[0], *inside) if found and inside else None

    def expert_path(self, layer: int, expert: int, module: Module) -> str:
        """What updates of one expert's part of a fused parameter are called: ``…mlp.experts.3.gate_up_proj``."""
        assert self.experts is not None
        return f"{self.layers}.{layer}.{self.experts.path}.{expert}.{module.name}"

    def refusal(self, path: str) -> str:
        """Why the file says that updates of this module are not migrated; empty if it does not name it."""
        why = self._refused(path)
        return REASONS.get(why, why)

    def as_parameter(self, path: str) -> bool:
        """Whether PEFT adapts a module that is not migrated as a parameter, and not as a linear module."""
        return self._refused(path) in AS_PARAMETERS

    def adapted(self, path: str) -> bool:
        """Whether PEFT adapts a module at all."""
        return self._refused(path) not in NOT_BY_PEFT

    def _refused(self, path: str) -> str:
        found = self._split(path)
        if found is None:
            return ""
        return next((why for start, why in self.refused.items() if f"{found[1]}.".startswith(f"{start}.")), "")

    def _split(self, path: str) -> tuple[int, str] | None:
        """The layer and the name below it, of a path under any of the layer stack's names."""
        match = _below(tuple(dict.fromkeys(self.names(self.layers + ".")))).fullmatch(path)
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

    def expert_numbers(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """How many experts a layer has, and the width of each; 0 where the family has none, or its config lacks one."""
        if self.experts is None:
            return 0, 0
        settings = self.settings(config)
        count, width = (_number(it, settings) for it in (self.experts.count, self.experts.intermediate_size))
        return int(count or 0), int(width or 0)

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


@lru_cache(maxsize=64)
def _below(stacks: tuple[str, ...]) -> re.Pattern[str]:
    """The number of a layer and the name below it, behind any of a layer stack's names."""
    return re.compile(rf"(?:{'|'.join(map(re.escape, stacks))})(\d+)\.(.+)")


def _number(sources: Sources, settings: Mapping[str, Any], layer: int = 0) -> float | None:
    """The first positive number among the sources; of a list with one for each layer, that layer's."""
    for source in sources:
        value = settings.get(source if isinstance(source, str) else source.of)
        if isinstance(value, list | tuple) and layer < len(value):
            value = value[layer]
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
            return value if isinstance(source, str) else source.times * float(value) ** source.power
    return None
