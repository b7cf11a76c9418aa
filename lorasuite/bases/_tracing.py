"""Base models read from inside: what their blocks and modules read and write."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorasuite.bases._architecture import Architecture
from lorasuite.bases._checkpoint import Checkpoint
from lorasuite.bases._modules import Dimensions, Module

#: Where activations are recorded: the layer; ``"block"``, the name of a module, a role or ``"head"``; ``"in"`` for what
#: is read there and ``"out"`` for what is written.
Place = tuple[int, str, str]


class AllSeen(Exception):
    """Everything that is to be recorded of a pass has been."""


@dataclass(frozen=True)
class LoadedBase:
    """One base model in memory, in evaluation mode, with what is needed to read it."""

    model: Any
    tokenizer: Any
    architecture: Architecture
    dims: Dimensions

    @classmethod
    def of(cls, model: Any, tokenizer: Any, checkpoint: Checkpoint) -> LoadedBase:
        """A loaded model and tokenizer, with the architecture and dimensions of the checkpoint they came from."""
        return cls(model, tokenizer, checkpoint.architecture, checkpoint.dims)

    @property
    def blocks(self) -> Any:
        """The transformer blocks in order, a ``ModuleList``."""
        return self.model.get_submodule(self.architecture.layers)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def fetch(self, layer: int) -> Any:
        """A block with its weights in memory, which it has until :meth:`free`."""
        return self.blocks[layer]

    def free(self, layer: int) -> None:
        """Let go of a block's weights, where they came with :meth:`fetch`."""

    @contextlib.contextmanager
    def entered(self, texts: Sequence[Tensor]) -> Iterator[None]:
        """What the model computes before its first block can be computed for these token ids while this lasts."""
        yield


class ActivationRecorder:
    """Records what chosen blocks and modules of one base read and write, while it is entered.

    Choose places by :meth:`block`, :meth:`module`, :meth:`block_and_modules`, :meth:`only` and :meth:`head`; each gives
    the recorder back. Run the model inside ``with``: :attr:`seen` has the last pass's tensors, detached,
    where and as the model made them, ``(texts, tokens, width)``. It holds references and copies nothing.
    """

    def __init__(self, base: LoadedBase) -> None:
        self.base = base
        #: What the last pass left, by place.
        self.seen: dict[Place, Tensor] = {}
        self._hooks: list[Callable[[], Any]] = []
        self._handles: list[Any] = []
        #: Places behind which a pass is of no more use.
        self._last: set[Place] = set()

    def block(self, layer: int) -> ActivationRecorder:
        """Record the hidden states before and after a block."""
        for end in ("in", "out"):
            self._hooks.append(functools.partial(self._hooked, self.base.blocks[layer], (layer, "block", end)))
        return self

    def module(self, layer: int, module: Module, by_role: bool = False) -> ActivationRecorder:
        """Record what a linear module reads and writes; nothing if the layer lacks it.

        Args:
            by_role: under the names of the module's roles, each with its own part of the output, and not under the
                module's name with the whole.
        """
        name = module.name

        def after(_module: Any, args: Any, output: Tensor) -> None:
            if not by_role:
                self._keep((layer, name, "in"), args[0])
                self._keep((layer, name, "out"), output)
                return
            written = module.split(output.detach().movedim(-1, 0), self.base.dims)
            for role in module.roles:
                self._keep((layer, role, "in"), args[0])
                self._keep((layer, role, "out"), written[role].movedim(0, -1))

        found = linear_modules(self.base, layer).get(name)
        if found is not None:
            self._hooks.append(lambda: found[1].register_forward_hook(after))
        return self

    def block_and_modules(self, layer: int) -> ActivationRecorder:
        """Record a block and every linear module it has."""
        self.block(layer)
        for module, _ in linear_modules(self.base, layer).values():
            self.module(layer, module)
        return self

    def only(self, places: Iterable[Place]) -> ActivationRecorder:
        """Record these places of blocks and of modules by name; a pass ends where the last of them has been seen.

        Such passes are run by :meth:`LayerStream.read`, of a stream made before; elsewhere they raise :class:`AllSeen`.
        """
        self._last = set(places)
        for place in self._last:
            layer, name, _ = place
            module = self.base.blocks[layer] if name == "block" else linear_modules(self.base, layer)[name][1]
            self._hooks.append(functools.partial(self._hooked, module, place))
        return self

    def _hooked(self, module: Any, place: Place) -> Any:
        def before(_module: Any, args: Any, kwargs: Any) -> None:
            self._keep(place, args[0] if args else kwargs["hidden_states"])

        def after(_module: Any, _args: Any, output: Any) -> None:
            self._keep(place, output[0] if isinstance(output, tuple) else output)

        if place[2] == "in":
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)

    def head(self) -> ActivationRecorder:
        """Record what the output embedding reads, under the layer behind the last and the name ``head``."""

        def before(_module: Any, args: Any) -> None:
            self._keep((self.base.dims.layers, "head", "in"), args[0])

        self._hooks.append(lambda: self.base.model.get_output_embeddings().register_forward_pre_hook(before))
        return self

    def __enter__(self) -> ActivationRecorder:
        """Start to record."""
        self._handles = [hook() for hook in self._hooks]
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop, and let go of what was seen."""
        for handle in self._handles:
            handle.remove()
        self.seen, self._handles = {}, []

    def _keep(self, place: Place, value: Tensor) -> None:
        self.seen[place] = main_stream(value.detach()) if place[1] == "block" else value.detach()
        if self._last and self._last <= self.seen.keys():
            raise AllSeen

    def run(self, ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Run a batch of texts without gradients.

        Args:
            ids: token ids ``(texts, tokens)``, on any device.
            attention_mask: of the same shape; not needed where padding is on the right and attention is causal.

        Returns:
            the model's own output.
        """
        self.seen = {}
        mask = {} if attention_mask is None else {"attention_mask": attention_mask.to(self.base.device)}
        with torch.inference_mode():
            return self.base.model(input_ids=ids.to(self.base.device), use_cache=False, **mask)

    def read(self, ids: Tensor, rows: tuple[Tensor, Tensor]) -> dict[Place, Tensor]:
        """Run a batch of texts; what was seen at the given ``(texts, positions)``: ``(rows, width)`` float64, CPU."""
        self.run(ids)
        return self.at(ids, rows)

    def at(
        self,
        ids: Tensor,
        rows: tuple[Tensor, Tensor],
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = "cpu",
    ) -> dict[Place, Tensor]:
        """What the last run of these texts saw at some of their positions: ``(rows, width)``.

        Rows are chosen where the model left them, so that only these are converted and moved.

        Args:
            ids: the token ids ``(texts, tokens)`` that were run, for their shape.
            rows: the texts' and the positions' numbers, ``(rows,)`` each.
            device: None leaves each where the model computed it.
        """
        found = {}
        for place, value in self.seen.items():
            chosen = tuple(index.to(value.device) for index in rows)
            found[place] = value.reshape(*ids.shape, -1)[chosen].to(device=device, dtype=dtype)
        return found


def main_stream(states: Tensor) -> Tensor:
    """What a block's attention and MLP read and add to, ``(texts, tokens, d)``: of several streams, ``(streams, texts,
    tokens, d)`` as in Gemma 3n, the first."""
    return states[0] if states.dim() == 4 else states


def linear_modules(base: LoadedBase, layer: int) -> dict[str, tuple[Module, Any]]:
    """The linear modules one block really has, by name."""
    found = {}
    for module in base.architecture.modules:
        with contextlib.suppress(AttributeError):  # some layers lack it: experts where others have an MLP
            found[module.name] = module, base.model.get_submodule(base.architecture.path(layer, module))
    return found


def put_weights(base: LoadedBase, weights: Mapping[str, Tensor]) -> None:
    """Weights back to what they were, by module path."""
    for path, weight in weights.items():
        base.model.get_submodule(path).weight.data.copy_(weight)
