"""A base model's weights on disk, read by the names of its architecture, without building a model."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lorasuite.bases._architecture import Architecture, in_order
from lorasuite.bases._architecture_files import architecture_for
from lorasuite.bases._files import DAMAGED, Weights, is_finite, missing, open_safetensors
from lorasuite.bases._meter import METER
from lorasuite.bases._modules import DOWN, GATE_UP, Dimensions, Module, Role
from lorasuite.bases._quantized import declared
from lorasuite.errors import CheckpointError, Problem


class Checkpoint(Weights):
    """A base model's weights on disk, opened lazily.

    Tensors come one at a time, in float32 (or, where that is asked for, in the 16 bits they are stored in), and are
    freed when the caller drops them; only the headers of the shards are kept. Quantized ones are dequantized as they
    are read, where that is a multiplication; a checkpoint in another quantized format is refused, never read as if it
    were plain.

    Attributes:
        architecture: what the names of its family are.
        dims: its dimensions, by its config.
    """

    def __init__(self, source: str | Path) -> None:
        """Find the directory and read its config.

        Args:
            source: a local directory or ``hub-id[/subfolder][@revision]``.

        Raises:
            CheckpointError: if the directory or its ``config.json`` is missing or cannot be read, or the config names
                a quantized format that is not dequantized here.
            ArchitectureError: if no architecture file describes the model, or its config lacks a number.
        """
        super().__init__(source)
        said = declared(self.config)
        if said is not None and said.why:
            raise CheckpointError(said.problem(self.source))
        where = str(self.path / "config.json")
        self.architecture: Architecture = architecture_for(self.config, where)
        self.dims: Dimensions = self.architecture.dimensions(self.config, where)
        with contextlib.suppress(CheckpointError):  # of weights that are asked for
            if self.architecture.measured:
                self.dims = replace(self.layer_dims(0), own=())

    def find(self, name: str) -> str | None:
        """The name a tensor has in this checkpoint (a family's checkpoints may differ in prefixes), or None."""
        own = self.architecture.own_name(name)
        names = [*self.architecture.names(name), *(self.architecture.names(own) if own != name else ())]
        if name == self.architecture.embedding + ".weight" and self.architecture.tied(self.config):
            # a tied pair may be stored under either name
            names += self.architecture.names(self.architecture.unembedding + ".weight")
        return next((candidate for candidate in names if candidate in self.shards), None)

    def modules(self, layer: int) -> tuple[Module, ...]:
        """The modules one layer has: optional ones where the checkpoint holds them, each role once."""
        present: list[Module] = []
        for module in self.architecture.modules:
            held = {role for other in present for role in other.roles}
            if not module.optional or (
                not held & set(module.roles) and self.find(self.architecture.path(layer, module) + ".weight")
            ):
                present.append(module)
        return tuple(present)

    def roles(self, layer: int) -> tuple[Role, ...]:
        """The roles one layer has."""
        return in_order(role for module in self.modules(layer) for role in module.roles)

    def layer_dims(self, layer: int) -> Dimensions:
        """The dimensions of one layer: its heads and MLP width may be its own, and its roles that are no standard ones
        have the sizes of their weights."""
        modules = self.modules(layer)
        dims = self._measured(layer, modules, self.architecture.widths(self.dims, layer, modules, self.config))
        own = [(module, found) for module in modules if module.own_roles and (found := self._own(layer, module, dims))]
        return replace(dims, own=tuple((module.own_roles[0], *size) for module, size in own)) if own else dims

    @cached_property
    def every_role(self) -> tuple[Role, ...]:
        """The roles that any layer has."""
        return in_order(role for layer in range(self.dims.layers) for role in self.roles(layer))

    @cached_property
    def sizes(self) -> Dimensions:
        """The dimensions, with the size of each role that is no standard one in the first layer that has it."""
        own: dict[Role, tuple[Role, int, int]] = {}
        if any(module.own_roles for module in self.architecture.modules):
            for layer in range(self.dims.layers):
                own = {size[0]: size for size in self.layer_dims(layer).own} | own
        return replace(self.dims, own=tuple(own.values()))

    def _measured(self, layer: int, modules: tuple[Module, ...], dims: Dimensions) -> Dimensions:
        """The dimensions with the numbers that the architecture says are read from the shapes of a layer's weights."""
        sizes = {
            module.roles[0]: size
            for module in modules
            if self.architecture.measured and len(module.roles) == 1 and (size := self._size(layer, module))
        }
        for name in self.architecture.measured:
            match name:
                case "head_dim" if "o" in sizes:
                    dims = replace(dims, head_dim=sizes["o"][1] // dims.heads)
                case "kv_heads" if "k" in sizes:
                    dims = replace(dims, kv_heads=max(sizes["k"][0] // dims.head_dim, 1))
                case "intermediate_size" if "down" in sizes:
                    dims = replace(dims, intermediate_size=sizes["down"][1])
        return dims

    def _size(self, layer: int, module: Module) -> tuple[int, int] | None:
        """``(out, in)`` of a module's weight; None where there is none."""
        stored = self.find(self.architecture.path(layer, module) + ".weight")
        header = self._headers.get(stored) if stored else None
        if header is None or len(header[0]) != 2:
            return None
        rows, columns = header[0][::-1] if module.transposed else header[0]
        return rows, columns

    def _own(self, layer: int, module: Module, dims: Dimensions) -> tuple[int, int] | None:
        """``(out, in)`` of a module's role that is no standard one: what is left by the others that it holds."""
        size = self._size(layer, module)
        if size is None:
            return None
        rows, columns = size
        if module.layout == "interleaved":
            return dims.heads * dims.head_dim, columns
        others = sum(dims.rows(role) for role in module.roles if role not in module.own_roles)
        return max(rows - others, 0), columns

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header alone.

        Raises:
            CheckpointError: if the tensor is missing.
        """
        stored = self._stored(name)
        with open_safetensors(self.shards[stored]) as handle:
            if stored not in handle.keys():  # noqa: SIM118 - not a dict
                raise CheckpointError(self._missing(stored))
            return tuple(handle.get_slice(stored).get_shape())

    def tensor(self, name: str, rows: Tensor | None = None, as_stored: bool = False) -> Tensor:
        """One tensor in float32, or some of its rows.

        Args:
            as_stored: one of 16 bits as it is, mapped from the file and not copied.

        Raises:
            CheckpointError: if it is missing, or holds NaN or Inf.
        """
        stored = self._stored(name)
        whole = self.read(stored)  # mapped from the file: rows that are not touched are not read
        tensor = whole if rows is None else whole[rows]
        if not as_stored or tensor.dtype not in (torch.float16, torch.bfloat16):
            tensor = tensor.float()
        if not is_finite(tensor):
            raise CheckpointError(Problem(str(self.shards[stored]), f"{stored} holds NaN or Inf", DAMAGED))
        return METER.watch(tensor)

    def weight(self, layer: int, module: Module, as_stored: bool = False) -> Tensor:
        """A block's weight ``(out, in)`` in float32, or as :meth:`tensor` gives it ``as_stored``.

        Raises:
            CheckpointError: if it is missing, or holds NaN or Inf.
        """
        stored = self.tensor(self.architecture.path(layer, module) + ".weight", as_stored=as_stored)
        return stored.T if module.transposed else stored

    def layer(self, layer: int, roles: tuple[Role, ...], as_stored: bool = False) -> dict[Role, Tensor]:
        """The weights of some roles of one block, fused ones split; each ``(out, in)``, float32.

        Args:
            as_stored: not in float32 where they are stored in 16 bits.

        Raises:
            CheckpointError: if one is missing, or holds NaN or Inf.
        """
        found: dict[Role, Tensor] = {}
        dims = self.layer_dims(layer)
        for module in self.modules(layer):
            if set(module.roles) & set(roles):
                whole = self.weight(layer, module, as_stored)
                for role, part in module.split(whole, dims).items():
                    if role in roles:
                        shared = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
                        found[role] = part if shared else METER.watch(part)
        return found

    @property
    def expert_count(self) -> int:
        """How many experts a layer of its mixtures has; 0 where the architecture file describes none."""
        return self.architecture.expert_numbers(self.config)[0]

    @cached_property
    def has_experts(self) -> bool:
        """Whether any layer has experts that the architecture file describes."""
        return any(self.experts(layer) is not None for layer in range(self.dims.layers))

    def experts(self, layer: int) -> Dimensions | None:
        """The dimensions of one expert of a layer, whose MLP has a width of its own; None where it has no experts."""
        count, width = self.architecture.expert_numbers(self.config)
        known = self.architecture.experts
        if not count or not width or known is None:
            return None
        names = [*(known.names[role] for role in known.names), GATE_UP.name]
        if not any(self._expert_tensor(layer, 0, name) for name in names):
            return None
        return replace(self.layer_dims(layer), intermediate_size=width)

    def expert(self, layer: int, number: int, roles: tuple[Role, ...], as_stored: bool = False) -> dict[Role, Tensor]:
        """The weights of some roles of one expert, each ``(out, in)`` float32, however the checkpoint stores them.

        Args:
            as_stored: not in float32 where they are stored in 16 bits.

        Raises:
            CheckpointError: if one is missing, or holds NaN or Inf.
        """
        known, found = self.architecture.experts, dict[Role, Tensor]()
        dims = self.experts(layer)
        assert known is not None and dims is not None
        for role, name in known.names.items():
            if role not in roles:
                continue
            if (own := self._expert_tensor(layer, number, name)) and f".{number}." in own:
                found[role] = self.tensor(own, as_stored=as_stored)
                continue
            module = DOWN if role == "down" else GATE_UP
            stored = self._expert_tensor(layer, number, module.name)
            if stored is None:
                raise CheckpointError(self._missing(self.architecture.expert_path(layer, number, module)))
            whole = self.tensor(stored, torch.tensor([number]), as_stored)[0]
            found[role] = module.split(whole, dims)[role]
        return found

    def _expert_tensor(self, layer: int, number: int, name: str) -> str | None:
        """What holds a projection of an expert: its own weight, or the 3-D parameter of all, if there is one."""
        known = self.architecture.experts
        assert known is not None
        places = [f"{self.architecture.layers}.{layer}.{place}" for place in (known.path, *known.others)]
        one = (found for place in places if (found := self.find(f"{place}.{number}.{name}.weight")))
        return next(one, None) or next((found for place in places if (found := self.find(f"{place}.{name}"))), None)

    def embedding(self, ids: Tensor | None = None) -> Tensor:
        """The input embedding ``(V, d)`` as the first block reads it, with the family's scale; float32.

        Args:
            ids: the rows of these tokens alone, ``(n, d)``: no others are read from the file.

        Raises:
            CheckpointError: if it is missing, or holds NaN or Inf.
        """
        rows = self.tensor(self.architecture.embedding + ".weight", ids)
        scale = self.architecture.scale(self.config)
        return rows if scale == 1 else rows.mul_(scale)

    def check(self) -> list[Problem]:
        """Everything the architecture file expects that the checkpoint does not have, from headers only.

        Of a quantized checkpoint that cannot be read that alone: its tensors are not the family's.
        """
        problems: list[Problem] = []
        expected: list[tuple[str, tuple[int, int]]] = []
        try:
            self.check_readable()
            shapes = self.shapes()
            if self.dims.layers > len(shapes):
                what = f"says {self.dims.layers} layers, and the weights are {len(shapes)} tensors"
                remedy = "The config does not belong to these weights."
                return [Problem(str(self.path / "config.json"), what, remedy)]
            for layer in range(self.dims.layers):
                dims, modules = self.layer_dims(layer), self.modules(layer)
                for module in (*modules, *self._siblings(modules)):
                    name = self.architecture.path(layer, module) + ".weight"
                    if module.own_roles and self._own(layer, module, dims) is None:
                        problems.append(self._missing(name))
                        continue
                    shape = sum(dims.rows(role) for role in module.roles), dims.columns(module.roles[0])
                    expected.append((name, shape[::-1] if module.transposed else shape))
        except CheckpointError as error:
            return error.problems
        embedding = self.find(self.architecture.embedding + ".weight")
        if embedding is None or embedding not in shapes:
            problems.append(self._missing(self.architecture.embedding + ".weight"))
        elif shapes[embedding][1] != self.dims.hidden_size:
            problems.append(
                Problem(
                    embedding,
                    f"is {shapes[embedding]}, config says hidden size {self.dims.hidden_size}",
                    "The config does not belong to these weights, or the embedding is projected to the hidden size, "
                    "which is not supported.",
                )
            )
        elif shapes[embedding][0] != self.dims.vocab_size:
            what = f"is {shapes[embedding]}, config says {self.dims.vocab_size} tokens"
            problems.append(Problem(embedding, what, "The config does not belong to these weights."))
        for name, shape in expected:
            stored = self.find(name)
            if stored is None or stored not in shapes:
                problems.append(self._missing(name))
            elif shapes[stored] != shape:
                problems.append(
                    Problem(
                        stored,
                        f"is {shapes[stored]}, the config implies {shape}",
                        f"The config does not belong to these weights, or {self.architecture.family}.yaml is wrong.",
                    )
                )
        return problems

    def _siblings(self, modules: tuple[Module, ...]) -> list[Module]:
        """Optional modules a layer lacks although it has others of the same parent: they are missing, not absent."""
        parents = {module.name.rpartition(".")[0] for module in modules if module.optional}
        return [
            module
            for module in self.architecture.modules
            if module.optional
            and not module.apart
            and module not in modules
            and module.name.rpartition(".")[0] in parents
        ]

    def _missing(self, name: str) -> Problem:
        return missing(self.path, name)

    def _stored(self, name: str) -> str:
        """The name a tensor has in this checkpoint; CheckpointError where it has none."""
        stored = self.find(name)
        if stored is None:
            raise CheckpointError(self._missing(name))
        return stored
