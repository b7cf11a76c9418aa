"""Base models read from inside: what their blocks and modules read and write, and blocks run one at a time.

A fit that goes through a model block by block would pass every text through all the blocks before it again and again.
:class:`Stream` keeps the texts' hidden states between blocks instead, so that the whole costs a few passes, whatever
the depth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorasuite.bases._architecture import Architecture, Dimensions, Module


@dataclass(frozen=True)
class Side:
    """One base model in evaluation mode, with what is needed to read it."""

    model: Any
    tokenizer: Any
    architecture: Architecture
    dims: Dimensions

    @property
    def blocks(self) -> Any:
        return self.model.get_submodule(self.architecture.layers)

    @property
    def device(self) -> Any:
        return next(self.model.parameters()).device


@dataclass
class Watch:
    """What chosen blocks and modules read (``in``) and write (``out``) at once: ``(texts, tokens, width)``."""

    side: Side
    seen: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)

    def block(self, layer: int) -> None:
        def before(_module: Any, args: Any, kwargs: Any) -> None:
            self._keep((layer, "block", "in"), args[0] if args else kwargs["hidden_states"])

        def after(_module: Any, _args: Any, output: Any) -> None:
            self._keep((layer, "block", "out"), output[0] if isinstance(output, tuple) else output)

        block = self.side.blocks[layer]
        self.handles += [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]

    def module(self, layer: int, module: Module, linear: Any) -> None:
        def after(_module: Any, args: Any, output: Tensor) -> None:
            self._keep((layer, module.name, "in"), args[0])
            self._keep((layer, module.name, "out"), output)

        self.handles.append(linear.register_forward_hook(after))

    def _keep(self, key: tuple[Any, ...], value: Tensor) -> None:
        self.seen[key] = value.detach()

    @contextlib.contextmanager
    def on(self) -> Iterator[Watch]:
        try:
            yield self
        finally:
            for handle in self.handles:
                handle.remove()

    def read(self, ids: Tensor, rows: tuple[Tensor, Tensor]) -> dict[tuple[Any, ...], Tensor]:
        """Run a batch of texts; what was seen at the given ``(texts, positions)``, float64 on the CPU."""
        self.seen = {}
        with torch.inference_mode():
            self.side.model(input_ids=ids.to(self.side.device), use_cache=False)
        return self.at(ids, rows)

    def at(self, ids: Tensor, rows: tuple[Tensor, Tensor]) -> dict[tuple[Any, ...], Tensor]:
        """What the last run of these texts saw at some of their positions, float64 on the CPU."""
        return {key: value.view(*ids.shape, -1).cpu()[rows].double() for key, value in self.seen.items()}


def linear_modules(side: Side, layer: int) -> dict[str, tuple[Module, Any]]:
    """The linear modules one block really has, by name."""
    found = {}
    for module in side.architecture.modules:
        with contextlib.suppress(AttributeError):  # some layers lack it: experts where others have an MLP
            found[module.name] = module, side.model.get_submodule(side.architecture.path(layer, module))
    return found


class _Stop(Exception):
    """Raised by a hook once a forward pass has gone far enough."""


class Stream:
    """Texts on their way through a base, block by block: the states before block :attr:`layer`, whatever its weights.

    Memory: two states ``(texts, tokens, d)`` on the CPU, in the model's own dtype, and what the model hands its blocks
    beside them (masks, rotary tables). Time: one pass to find the latter, then a block at a time; never the head.
    """

    def __init__(self, side: Side, texts: Sequence[Tensor]) -> None:
        """
        Args:
            texts: token ids, ``(texts, tokens)`` each.
        """
        self.side, self.texts, self.layer = side, list(texts), 0
        self.states: list[Tensor] = []
        self._outputs: list[Tensor | None] = [None] * len(self.texts)
        self._beside: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        # before other hooks: what those do to the state is done again when the block is run
        handles = [
            block.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True) for block in side.blocks
        ]
        try:
            with torch.inference_mode():
                for ids in self.texts:
                    self._beside.append([])
                    with contextlib.suppress(_Stop):
                        side.model(input_ids=ids.to(side.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._beside[-1]
        if not given:
            self.states.append((args[0] if args else kwargs["hidden_states"]).to("cpu", copy=True))
        given.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))
        if len(given) == len(self.side.blocks):
            raise _Stop  # before the last block and the head, whose logits may be larger than all states

    def run(self, number: int) -> Tensor:
        """The next block's output for the texts of one batch, ``(texts, tokens, d)``; hooks on the block fire."""
        args, kwargs = self._beside[number][self.layer]
        state = self.states[number].to(self.side.device, copy=True)  # a block may write into what it is given
        with torch.inference_mode():
            found = self.side.blocks[self.layer](state, *args, **kwargs)
        output: Tensor = found[0] if isinstance(found, tuple) else found
        self._outputs[number] = output.cpu()
        return output

    def read(self, watch: Watch, number: int, rows: tuple[Tensor, Tensor]) -> dict[tuple[Any, ...], Tensor]:
        """:meth:`run`, and what was seen at some positions, float64 on the CPU."""
        watch.seen = {}
        self.run(number)
        return watch.at(self.texts[number], rows)

    def advance(self, again: bool = False) -> None:
        """Go on behind the block, with what it gave last; ``again``: with what it gives now."""
        for number in range(len(self.texts)):
            if again or self._outputs[number] is None:
                self.run(number)
            output = self._outputs[number]
            assert output is not None
            self.states[number], self._outputs[number] = output, None
        self.layer += 1


def put_weights(side: Side, weights: Mapping[str, Tensor]) -> None:
    """Weights back to what they were, by module path."""
    for path, weight in weights.items():
        side.model.get_submodule(path).weight.data.copy_(weight)
