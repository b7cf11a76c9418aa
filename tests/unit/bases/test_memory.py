"""The memory promise: of two base models of any depth, two layers (or the two embeddings) are in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lorasuite.adapters import Adapter
from lorasuite.bases import ATTENTION, METER, Checkpoint, CommonTokens
from lorasuite.correspondence import fit_transfer_matrix, map_heads, mlp_factor
from lorasuite.transforms import migrate

DEEP, SHALLOW = 12, 8
NUMBERS = {"hidden": 32, "intermediate": 64, "heads": 4}


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    gc.collect()
    before = METER.current
    METER.reset()
    yield
    gc.collect()
    assert METER.current == before, "tensors outlive the call that loaded them"


def bytes_of(checkpoint: Checkpoint, roles: tuple[str, ...] | None = None) -> int:
    """One layer's weights in float32."""
    return 4 * sum(
        checkpoint.dims.rows(role) * checkpoint.dims.columns(role)
        for module in checkpoint.architecture.modules
        for role in module.roles
        if roles is None or role in roles
    )


def ids(rows: int) -> CommonTokens:
    return CommonTokens(torch.arange(rows), torch.arange(rows), True, rows, rows)


FAMILIES = [("llama", "llama"), ("gpt_neox", "bloom"), ("qwen2", "gpt_neox"), ("bloom", "llama")]


@pytest.mark.parametrize(("f_o", "f_n"), FAMILIES)
def test_two_layers_at_a_time(
    f_o: str, f_n: str, base: Callable[..., Path], lora: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    old_path = base(f_o, layers=SHALLOW, **NUMBERS)
    new_path = base(f_n, layers=DEEP, seed=1, **{**NUMBERS, "hidden": 48})
    old, new, adapter = Checkpoint(old_path), Checkpoint(new_path), Adapter.open(lora(old_path))
    # Fitting W_h holds some rows of the two embeddings, and nothing else.
    start = METER.current
    monkeypatch.setattr("lorasuite.correspondence._transfer_matrix.CHUNK", 10)
    W = fit_transfer_matrix(old, new, ids(96))
    embeddings = 4 * 96 * (32 + 48)
    assert 0 < METER.peak - start <= 4 * 10 * (32 + 48)
    layers = {n: n + 2 for n in range(SHALLOW)}

    gc.collect()
    METER.reset()
    heads = {o: match.heads for o, match in map_heads(old, new, layers, W).items()}
    attention = bytes_of(old, ATTENTION) + bytes_of(new, ATTENTION)
    assert attention <= METER.peak - start <= bytes_of(old) + bytes_of(new)

    gc.collect()
    METER.reset()
    migrate(
        adapter, old, new, method="lorasuite", layers=layers, heads=heads, transfer=W, rank=3,
        mlp_factor=lambda layer, role: mlp_factor(old, layer, role),
    )  # fmt: skip
    both = bytes_of(old) + bytes_of(new)
    assert bytes_of(old) < METER.peak - start <= both
    assert both + embeddings < 4 * bytes_of(new), "the bound says something about a model this deep"


def test_few_targets_load_few_weights(base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    path = base("llama", layers=DEEP, **NUMBERS)
    old = Checkpoint(path)
    layers = {n: n for n in range(DEEP)}
    start = METER.current
    migrate(
        Adapter.open(lora(path, targets=["q_proj", "v_proj"])), old, old, method="lorasuite", layers=layers,
        heads={n: {a: a for a in range(4)} for n in layers}, transfer=fit_transfer_matrix(old, old, ids(96)), rank=3,
        mlp_factor=lambda layer, role: mlp_factor(old, layer, role),
    )  # fmt: skip
    assert METER.peak - start == 2 * bytes_of(old, ("q", "v"))
