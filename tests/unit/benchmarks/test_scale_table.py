"""The scale table counts the published way as the benchmark that measures it runs it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.scale_table import (
    CELLS,
    PUBLISHED,
    decomposed,
    factors,
    published_ops,
    ratio_measured,
    shape,
    ways,
    work,
)
from benchmarks.shapes import published
from lorasuite.planning import Ops, Throughput

MEASURED = [path.stem for path in sorted(PUBLISHED.glob("*.json"))]


@pytest.mark.parametrize("name", MEASURED)
def test_the_counted_ratio_is_near_the_measured_one(name: str) -> None:
    cell = json.loads((CELLS / f"{name}.json").read_text())
    ratio = json.loads((PUBLISHED / f"{name}.json").read_text())["ratio"]
    old, new = name.split("--")
    first, second = shape(published(old)), shape(published(new))
    found = ways(first, second, work(first, second), Throughput(**cell["cost"]["measured"]), factors(cell))
    for counted, seen in zip(found, (ratio["first adapter"], ratio["each after"]), strict=True):
        # by count ours is longer: a cell has but one layer for what a stage does once
        assert seen / 2.5 < counted < seen * 2
    assert ratio_measured(old, new) == f"{ratio['first adapter']:,.0f} ×, {ratio['each after']:,.0f} ×"
    assert ratio_measured(new, old) == "–"


def test_equal_hidden_sizes_are_not_mapped_and_tall_matrices_are_made_square() -> None:
    """Of one base and itself, no product has three hidden sizes in it."""
    one = shape(published("qwen-1.5-1.8b"))
    wider = replace(one, dims=replace(one.dims, hidden_size=one.dims.hidden_size + 1))
    same, other = (published_ops(one, new)[0].single for new in (one, wider))
    carried = 2 * one.dims.heads * 4 * one.dims.hidden_size**3 * one.dims.layers
    assert other - same == pytest.approx(carried, rel=0.01)
    assert decomposed(8, 2) == decomposed(2, 8) == Ops(svd=8, single=6 * 8 * 4) and decomposed(3, 3) == Ops(svd=27)


def test_every_measured_pair_has_a_cell() -> None:
    assert MEASURED and all((CELLS / f"{name}.json").is_file() for name in MEASURED)
