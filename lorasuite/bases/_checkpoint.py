"""A base model's weights on disk, read by the names of its architecture, without building a model."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lorasuite.bases._architecture import ROLES, Architecture, Dimensions, Module, Role
from lorasuite.bases._architecture_files import architecture_for
from lorasuite.bases._files import DAMAGED, Weights, is_finite, missing, open_safetensors
from lorasuite.bases._meter import METER
from lorasuite.bases._quantized import declared
from lorasuite.errors import CheckpointError, Problem


class Checkpoint(Weights):
    """A base model's weights on disk, opened lazily.

    Tensors come one at a time, in float32, and are freed when the caller drops them; only the headers of the shards
    are kept. Quantized ones are dequantized as they are read, where that is a multiplication; a checkpoint in another
    quantized format is refused, never read as if it were plain.

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

    def find(self, name: str) -> str | None:
        """The name a tensor has in this checkpoint (a family's checkpoints may differ in prefixes), or None."""
        names = [*self.architecture.names(name)]
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
        held = {role for module in self.modules(layer) for role in module.roles}
        return tuple(role for role in ROLES if role in held)

    def layer_dims(self, layer: int) -> Dimensions:
        """The dimensions of one layer, whose MLP width may be its own."""
        return self.architecture.widths(self.dims, self.modules(layer), self.config)

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

    def tensor(self, name: str, rows: Tensor | None = None) -> Tensor:
        """One tensor in float32, or some of its rows.

        Raises:
            CheckpointError: if it is missing, or holds NaN or Inf.
        """
        stored = self._stored(name)
        whole = self.read(stored)  # mapped from the file: rows that are not touched are not read
        tensor = (whole if rows is None else whole[rows]).float()
        if not is_finite(tensor):
            raise CheckpointError(Problem(str(self.shards[stored]), f"{stored} holds NaN or Inf", DAMAGED))
        return METER.watch(tensor)

    def weight(self, layer: int, module: Module) -> Tensor:
        """A block's weight ``(out, in)`` in float32, however it is stored.

        Raises:
            CheckpointError: if it is missing, or holds NaN or Inf.
        """
        stored = self.tensor(self.architecture.path(layer, module) + ".weight")
        return stored.T if module.transposed else stored

    def layer(self, layer: int, roles: tuple[Role, ...]) -> dict[Role, Tensor]:
        """The weights of some roles of one block, fused ones split; each ``(out, in)``, float32.

        Raises:
            CheckpointError: if one is missing, or holds NaN or Inf.
        """
        found: dict[Role, Tensor] = {}
        dims = self.layer_dims(layer)
        for module in self.modules(layer):
            if set(module.roles) & set(roles):
                whole = self.weight(layer, module)
                for role, part in module.split(whole, dims).items():
                    if role in roles:
                        shared = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
                        found[role] = part if shared else METER.watch(part)
        return found

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
            for layer in range(self.dims.layers):
                dims, modules = self.layer_dims(layer), self.modules(layer)
                for module in (*modules, *self._siblings(modules)):
                    shape = sum(dims.rows(role) for role in module.roles), dims.columns(module.roles[0])
                    name = self.architecture.path(layer, module) + ".weight"
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
            if module.optional and module not in modules and module.name.rpartition(".")[0] in parents
        ]

    def _missing(self, name: str) -> Problem:
        return missing(self.path, name)

    def _stored(self, name: str) -> str:
        """The name a tensor has in this checkpoint; CheckpointError where it has none."""
        stored = self.find(name)
        if stored is None:
            raise CheckpointError(self._missing(name))
        return stored
