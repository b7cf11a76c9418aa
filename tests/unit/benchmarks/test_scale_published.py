"""The published way of the scale benchmark gives what this project gives."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.scale_published import measure
from benchmarks.shapes import llama


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (llama(3, 32, 48, 4, 4, 200), llama(5, 32, 80, 4, 2, 200)),
        (llama(4, 32, 80, 4, 2, 200), llama(2, 48, 96, 6, 6, 200)),
    ],
)
def test_both_ways_give_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    found = measure([old, new])
    assert found["differences"].keys() == {"similarity", "q", "k", "v", "o", "gate", "up", "down"}
    assert max(found["differences"].values()) < 1e-3
    assert found["layers"] == min(old["num_hidden_layers"], new["num_hidden_layers"])
    for side in ("published", "ours", "floor"):
        assert found[side].keys() == {"head_mapping", "transform", "once"}
    for key in ("ratio", "attainable"):
        assert found[key].keys() == {"first adapter", "head mapping and transform", "each after"}
