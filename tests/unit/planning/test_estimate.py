"""The time estimate: what is counted, and that it says what it rests on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lorasuite.adapters import Adapter
from lorasuite.bases import Checkpoint
from lorasuite.planning import Throughput, active, estimate, inspect, measure
from tests import kinds, models

SPEED = Throughput("cpu", forward=1e6, double=1e6, eigen=1e6, svd=1e6, read=1e6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "mixtral"])
def test_active_weights(family: str, base: Callable[..., Path]) -> None:
    """Every matrix but the input embedding, unless it is the output one too; half of two experts."""
    model = models.load(base(family))
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.get_output_embeddings().weight
    expected = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and (parameter is not embedding or tied):
            expected += parameter.numel() // (2 if "experts" in name else 1)
    assert active(Checkpoint(base(family))) == expected


def test_stages_follow_what_has_to_be_done(
    base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    old, new = Checkpoint(base("llama")), Checkpoint(base("llama", hidden=48, seed=1))
    adapter = Adapter.open(lora(old.path))
    found = estimate(old, new, adapter, SPEED)
    assert found["total"] == pytest.approx(sum(found["seconds"].values())) and "measurement" in found["assumes"]
    # 100 rows of 256 tokens, 3 times: 6 operations a weight
    assert found["seconds"]["finetune"] == pytest.approx(6 * 100 * 256 * 3 * active(new) / 1e6)
    assert found["seconds"]["activations"] == pytest.approx(2 * 256 * 256 * (active(old) + active(new)) / 1e6)
    assert all(found["seconds"][name] > 0 for name in ("fingerprint", "transfer_matrices", "mlp_factors", "transform"))
    same = estimate(old, old, adapter, SPEED)["seconds"]
    assert same["transfer_matrices"] == 0 and same["read_adapter"] == 0
    attention = Adapter.open(lora(old.path, targets=["q_proj"]))
    assert estimate(old, new, attention, SPEED)["seconds"]["mlp_factors"] == 0
    faster = estimate(old, new, adapter, replace(SPEED, forward=2e6))["seconds"]
    assert faster["finetune"] == pytest.approx(found["seconds"]["finetune"] / 2)
    assert faster["head_mapping"] == found["seconds"]["head_mapping"]
    loha = Adapter.open(kinds.build(kinds.MIGRATED["LoHa"], tmp_path / "a", old.path))
    sizes = 3 * (2 * 32**3 + 32**3 + 32**2 * 48)  # q, v, o and down of three layers
    assert estimate(old, new, loha, SPEED)["seconds"]["read_adapter"] == pytest.approx(sizes / 1e6)


def test_inspect_shows_it_where_nothing_is_wrong(base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    old, new = str(base("llama")), str(base("llama", hidden=48, seed=1))
    speed = measure(Checkpoint(old), size=32)
    assert min(speed.forward, speed.double, speed.eigen, speed.svd, speed.read) > 0
    found = inspect(old, new, str(lora(Path(old))), timed=True)
    assert found.time["total"] > 0 and found.time["measured"]["device"] in ("cpu", "cuda")
    assert not inspect(old, new, str(lora(Path(old)))).time  # the checks before a migration measure nothing
