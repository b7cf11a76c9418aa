"""Bases read layer by layer: the weights of one block in memory at a time, the texts' states kept between blocks.

The layer is outside and the batches are inside. A fit that goes through a model block by block would else pass every
text through all the blocks before it again and again, and a model too large for the memory could not be read at all.

What it costs at 8B (Llama-3-8B: 32 layers, d = 4,096; 256 texts of 64 tokens are N = 16,384 tokens), once for each
base and stage that reads it: 14 GB of bfloat16 blocks from disk or the page cache; 2·N·7.0e9 = 229 TFLOP, and 4·N·T·d
a layer for attention over T tokens, which at T = 64 is 1 % of a layer. Memory on the device: one block (436 MB in
bfloat16, 872 MB in float32) and the activations of one batch; on the CPU: the states before and behind the block,
2·N·d elements (268 MB in bfloat16), and while the texts enter, those rows of the embedding that they name.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasuite.bases._checkpoint import Checkpoint
from lorasuite.bases._files import open_safetensors
from lorasuite.bases._loading import empty_model, known_dtype
from lorasuite.bases._tracing import ActivationRecorder, AllSeen, LoadedBase, Place
from lorasuite.errors import CheckpointError, Problem


@dataclass(frozen=True)
class _Slot:
    """A parameter or buffer of the model, and the tensor of the checkpoint that belongs there."""

    module: torch.nn.Module
    name: str
    stored: str
    file: Path

    @property
    def empty(self) -> bool:
        """Whether it is a parameter without values."""
        value = self.module._parameters.get(self.name)
        return value is not None and value.is_meta

    def clear(self) -> None:
        """Let go of a parameter's values."""
        value = self.module._parameters.get(self.name)
        if value is not None and not value.is_meta:
            self.put(torch.empty_like(value, device="meta"))

    def put(self, value: Tensor) -> None:
        """Make this its value."""
        if self.name in self.module._parameters:
            self.module._parameters[self.name] = torch.nn.Parameter(value, requires_grad=False)
        else:
            self.module._buffers[self.name] = value


@dataclass(frozen=True)
class StreamedBase(LoadedBase):
    """A base of which only a block at hand has weights in memory: to be read by :class:`LayerStream`.

    Its ``model`` is the one that transformers builds, with parameters on the meta device, so it cannot be run as a
    whole; :class:`ActivationRecorder` and :func:`linear_modules` take it as any other. What is written into the weights
    of a block is lost when it is let go.
    """

    checkpoint: Checkpoint
    at: torch.device
    dtype: torch.dtype
    _slots: dict[int, list[_Slot]] = field(default_factory=lambda: defaultdict(list))  # -1: outside the blocks

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        tokenizer: Any,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
    ) -> StreamedBase:
        """Build the model without weights, and find those of each block by the names of the architecture file.

        Args:
            dtype: None means the checkpoint's own; on a CPU float32, unless it has instructions for bfloat16 files.

        Raises:
            CheckpointError: if the model cannot be built, or its blocks cannot be filled tensor by tensor: where it is
                quantized in a format that is not dequantized here, or where transformers makes its parameters of
                several tensors when it loads them, as it does with the experts of a mixture.
        """
        where = torch.device(device)
        wanted = known_dtype(checkpoint.path, where, dtype)
        model = empty_model(checkpoint.path, wanted, trust_remote_code)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(where)
        known = wanted or next(model.parameters()).dtype
        base = cls(model, tokenizer, checkpoint.architecture, checkpoint.dims, checkpoint, where, known)
        base._find()
        return base

    @property
    def device(self) -> torch.device:
        """Where blocks are put and run."""
        return self.at

    def fetch(self, layer: int) -> Any:
        """A block with its weights read and put on the device; they stay until :meth:`free`."""
        block, slots = self.blocks[layer], self._slots[layer]
        if any(slot.empty for slot in slots):
            self._fill(slots)
        return block

    def free(self, layer: int) -> None:
        """Let go of a block's weights."""
        for slot in self._slots[layer]:
            slot.clear()

    @contextlib.contextmanager
    def entered(self, texts: Sequence[Tensor]) -> Iterator[None]:
        """What the model computes before its first block can be computed for these token ids while this lasts.

        Of the embedding only their rows are read. Any other module outside the blocks gets its weights when it is
        first called.
        """
        embedding = self.model.get_input_embeddings()
        by_module: dict[torch.nn.Module, list[_Slot]] = defaultdict(list)
        for slot in self._slots[-1]:
            by_module[slot.module].append(slot)

        def before(module: torch.nn.Module, _args: Any) -> None:
            self._fill(slot for slot in by_module[module] if slot.empty)

        self._rows(by_module.pop(embedding)[0], torch.cat([ids.flatten() for ids in texts]).unique())
        handles = [module.register_forward_pre_hook(before, prepend=True) for module in by_module]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for slot in self._slots[-1]:
                slot.clear()

    def _find(self) -> None:
        """Which tensor of the checkpoint each parameter of the model is."""
        shapes = self.checkpoint.shapes()
        self.checkpoint.check_readable()
        stack = self.architecture.layers + "."
        lacking = []
        converts = _converters(self.model)
        for path, module in self.model.named_modules():
            inside = f"{path}.".startswith(stack) and path.removeprefix(stack).partition(".")[0]
            tensors = {**module._parameters, **{n: b for n, b in module._buffers.items() if b is not None}}
            for name, value in tensors.items():
                if value is None:
                    continue
                whole = f"{path}.{name}"
                stored = self.checkpoint.find(whole)
                if stored is not None and shapes.get(stored) == tuple(value.shape) and not converts(stored):
                    slot = _Slot(module, name, stored, self.checkpoint.shards[stored])
                    self._slots[int(inside) if inside else -1].append(slot)
                elif name in module._parameters and inside:
                    lacking.append(whole)
        if lacking or not any(slot.module is self.model.get_input_embeddings() for slot in self._slots[-1]):
            what = f"the checkpoint has no tensor that is {lacking[0] if lacking else 'the embedding'}"
            raise CheckpointError(_unstreamable(self.checkpoint, what))

    def _fill(self, slots: Iterable[_Slot]) -> None:
        """Read these tensors, file by file."""
        files: dict[Path, list[_Slot]] = defaultdict(list)
        for slot in slots:
            files[slot.file].append(slot)
        for file, here in files.items():
            with open_safetensors(file) as handle:
                for slot in here:
                    slot.put(self._cast(self._read(handle, slot)))

    def _rows(self, slot: _Slot, rows: Tensor) -> None:
        """Fill these rows of the embedding; the others hold anything, and on a CPU take no memory."""
        with open_safetensors(slot.file) as handle:
            stored = self._read(handle, slot)  # mapped from the file: what is not touched is not read
            weight = torch.empty(stored.shape, dtype=self.dtype, device=self.at)
            weight[rows.to(self.at)] = self._cast(stored[rows.cpu()])
        slot.put(weight)

    def _read(self, handle: Any, slot: _Slot) -> Tensor:
        """A tensor of an open file; dequantized where the checkpoint is quantized."""
        tensor: Tensor = handle.get_tensor(slot.stored)
        return tensor if self.checkpoint.quantization is None else self.checkpoint.read(slot.stored)

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.at, self.dtype if value.is_floating_point() else value.dtype)


def _converters(model: Any) -> Any:
    """Whether transformers computes with a tensor of the checkpoint, rather than to take it as it is, by its name."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    found = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightConverter)]
    return lambda stored: any(one.rename_source_key(stored)[1] is not None for one in found)


def _unstreamable(checkpoint: Checkpoint, what: str) -> Problem:
    return Problem(checkpoint.source, f"cannot be read layer by layer: {what}", "Load it whole.")


#: What a block is given beside the states: positional and named.
_Beside = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):
    """Raised by a hook once a forward pass has gone far enough."""


class LayerStream:
    """Texts on their way through a base, block by block: the states before block :attr:`layer`, whatever its weights.

    A context manager, or to be closed: it lets go of the block's weights. Batches are run as they are given: sort them
    by length (:func:`text_batches` and :func:`length_batches` do). Padding is on the right; under causal attention
    nothing sees it, so no mask is needed.

    Time: a block at a time, never the final norm or the head; what the model hands its blocks beside the states
    (masks, rotary tables) comes from one pass in which blocks do nothing. Memory: two states ``(texts, tokens, d)`` on
    the CPU, in the model's own dtype, one block's weights, and one batch's activations.

    Attributes:
        layer: the block that :meth:`run` runs; the number of layers when all are through.
        states: each batch's states before that block.
    """

    def __init__(self, base: LoadedBase, texts: Sequence[Tensor]) -> None:
        """Compute what the first block reads.

        Args:
            texts: token ids, ``(texts, tokens)`` each.
        """
        self.base, self.texts, self.layer = base, list(texts), 0
        self.states: list[Tensor] = []
        self._outputs: list[Tensor | None] = [None] * len(self.texts)
        self._beside: list[list[_Beside]] = []
        self._as_tuple = False
        with base.entered(self.texts), self._idle_blocks(), torch.inference_mode():
            for ids in self.texts:
                state, beside = self._enter(ids)
                self.states.append(state)
                self._beside.append(beside)

    def __enter__(self) -> LayerStream:
        """The stream itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Let go of the block at hand."""
        self.close()

    def close(self) -> None:
        """Let go of the weights of the block at hand."""
        if self.layer < len(self.base.blocks):
            self.base.free(self.layer)

    def fetch(self) -> Any:
        """The next block, with its weights at hand: what is written into them is what :meth:`run` runs with."""
        return self.base.fetch(self.layer)

    def run(self, number: int) -> Tensor:
        """The next block's output for the texts of one batch, ``(texts, tokens, d)``; hooks on the block fire."""
        block = self.fetch()
        args, kwargs = self._beside[number][self.layer]
        state = self.states[number].to(self.base.device, copy=True)  # a block may write into what it is given
        with torch.inference_mode():
            found = block(state, *args, **kwargs)
        output: Tensor = found[0] if isinstance(found, tuple) else found
        self._outputs[number] = output.cpu()
        return output

    def read(
        self,
        recorder: ActivationRecorder,
        number: int,
        rows: tuple[Tensor, Tensor],
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = "cpu",
    ) -> dict[Place, Tensor]:
        """:meth:`run`, as far as an entered recorder wants it, and what that saw at some positions:
        :meth:`ActivationRecorder.at`."""
        recorder.seen = {}
        self._outputs[number] = None
        with contextlib.suppress(AllSeen):
            self.run(number)
        return recorder.at(self.texts[number], rows, dtype=dtype, device=device)

    def advance(self, again: bool = False) -> None:
        """Go on behind the block, with what it gave last, and let go of it; ``again``: with what it gives now."""
        for number in range(len(self.texts)):
            if again or self._outputs[number] is None:
                self.run(number)
            output = self._outputs[number]
            assert output is not None
            self.states[number], self._outputs[number] = output, None
            self._beside[number][self.layer] = (), {}
        self.base.free(self.layer)
        self.layer += 1

    def _enter(self, ids: Tensor) -> tuple[Tensor, list[_Beside]]:
        """The state before the first block, on the CPU, and what each block is given beside it."""
        states: list[Tensor] = []
        beside: list[_Beside] = []

        def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states.append(args[0] if args else kwargs["hidden_states"])
            beside.append((args[1:], {name: it for name, it in kwargs.items() if name != "hidden_states"}))
            if len(states) == len(self.base.blocks) or states[-1].shape != states[0].shape:
                raise _Stop  # before the head, whose logits may be larger than all states

        # before other hooks: what those do to the state is done again when the block is run
        handles = [
            block.register_forward_pre_hook(before, with_kwargs=True, prepend=True) for block in self.base.blocks
        ]
        try:
            with contextlib.suppress(_Stop):
                self.base.model(input_ids=ids.to(self.base.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if states[-1].shape != states[0].shape and not self._as_tuple:
            self._as_tuple = True  # the model took the first of the texts: it expects the first of a tuple
            return self._enter(ids)
        return states[0].to("cpu", copy=True), beside

    @contextlib.contextmanager
    def _idle_blocks(self) -> Iterator[None]:
        """Blocks that give back what they are given, while this lasts."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            state = args[0] if args else kwargs["hidden_states"]
            return (state,) if self._as_tuple else state

        own = [vars(block).get("forward") for block in self.base.blocks]  # accelerate puts one there
        for block in self.base.blocks:
            block.forward = forward
        try:
            yield
        finally:
            for block, before in zip(self.base.blocks, own, strict=True):
                if before is None:
                    del block.forward
                else:
                    block.forward = before
