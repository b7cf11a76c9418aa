"""How the rows of an optimizer step are divided into forward passes, and what such a pass takes of the memory.

Which rows make a step is left alone: they are drawn at random, and a step's loss is the mean over its label tokens
however they are divided, so that the division changes a result by rounding only. Rows of like lengths go together
where the padding that saves is worth another pass. Padding of random batches of 16, as a share of the tokens there
are (Gemma's tokens; 100 rows, 1,000 rows):

| task | one pass a step | divided (CPU, 2 passes) | ``group_by_length`` |
|---|---|---|---|
| Banking77, 27 tokens a row | 109 %, 99 % | 26 %, 25 % | 104 %, 12 % |
| SNIPS, 52 | 40 %, 50 % | 15 %, 16 % | 41 %, 6 % |
| E2E, 64 | 39 %, 36 % | 14 %, 14 % | 38 %, 5 % |

``group_by_length`` of transformers' Trainer samples batches of like lengths: on 100 rows it groups nothing, and on more
it changes what a step averages over for no less padding. Packing (TRL's ``SFTTrainer``, ``padding_free``) needs
FlashAttention and position ids that neither a CPU nor every family here has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lorasuite.bases import free_ram
from lorasuite.training._head import CHUNK, LabelHead

#: What a forward and backward pass costs beside its tokens, in tokens: reading the weights, and a GPU's launches. On a
#: CPU by steps of Gemma 3 270M, where 32 took a fifth longer on two threads, and of SmolLM2-135M, where it made no
#: difference (``benchmarks/step.py``).
PASS_TOKENS = {"cpu": 96, "cuda": 1024}
#: Share of the free memory that activations may take, by their estimate.
FILL = 0.7


@dataclass
class Fitting:
    """What was found to fit into the memory. Runs on the same rows from the same start share it: it is measured once.

    ``rows``: most rows of a forward pass; None before that is known. ``checkpointing``: whether activations are
    recomputed in the backward pass.
    """

    rows: int | None = None
    checkpointing: bool = False


def passes(lengths: Sequence[int], most: int, overhead: int) -> list[list[int]]:
    """Rows by forward pass: of the divisions of the rows, sorted by length, the one that costs least.

    A pass costs its padded tokens and ``overhead``. Exact, by dynamic programming over where the last pass begins.

    Args:
        lengths: tokens of each row.
        most: rows of a pass.
        overhead: tokens that another pass is worth.

    Returns:
        the rows' places in ``lengths``, the longest rows first: memory runs out at once or not at all.
    """
    order = sorted(range(len(lengths)), key=lambda n: lengths[n], reverse=True)
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the first n rows, and where their last pass begins
    for end in range(1, len(order) + 1):
        begins = range(max(0, end - most), end)
        costs = [(best[begin][0] + overhead + (end - begin) * lengths[order[begin]], begin) for begin in begins]
        best.append(min(costs))
    found: list[list[int]] = []
    end = len(order)
    while end:
        begin = best[end][1]
        found.append(order[begin:end])
        end = begin
    return found[::-1]


def activation_bytes(head: LabelHead, batch: dict[str, Tensor]) -> int:
    """Bytes that the forward pass of a batch keeps for its backward pass, without the head; measured by doing it.

    Every storage counts once and weights not at all.

    Args:
        head: of the model, in training mode.
        batch: the model's inputs, on its device.
    """
    weights = {p.untyped_storage().data_ptr() for p in head.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself it would keep alive the node that it is the output of, and that keeps it

    devices = [batch["input_ids"].device] if batch["input_ids"].is_cuda else []
    with torch.random.fork_rng(devices), torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        states = head.states(batch)
    del states  # only now may storages be freed and their addresses be used again
    return sum(kept.values())


def rows_that_fit(row_bytes: int, free: int) -> int:
    """Rows of a forward pass that fit into the memory beside a chunk of logits and its gradient; 0 if none does."""
    return max(0, int((free - 3 * 4 * CHUNK) * FILL) // max(row_bytes, 1))


def free_memory(device: torch.device) -> int:
    """Bytes this process can still take: free or only cached on a GPU, else of the machine or its control group."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return free_ram()
