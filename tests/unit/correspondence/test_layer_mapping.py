"""Algorithm 1 against every possible map."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasuite.correspondence import map_layers
from lorasuite.errors import ConfigError, LoRASuiteError
from tests.unit import oracle


def table(rows: int, columns: int, seed: int, levels: int | None = None) -> torch.Tensor:
    """Random similarities; with ``levels`` only so many different values, hence many ties."""
    g = torch.Generator().manual_seed(seed)
    if levels is None:
        return torch.rand(rows, columns, generator=g, dtype=torch.float64) * 2 - 1
    return torch.randint(0, levels, (rows, columns), generator=g).double() / 4


def check(S: torch.Tensor, offset: int | None) -> dict[int, int]:
    best, maps = oracle.best_layers(S, offset)
    ours = map_layers(S, max_offset=offset)
    assert sum(float(S[o, n]) for o, n in ours.items()) == pytest.approx(best, abs=1e-9)
    assert ours in maps
    return ours


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**16), st.sampled_from([None, 2, 3]), st.data())
def test_it_is_the_best_of_all_maps(
    rows: int, columns: int, seed: int, levels: int | None, data: st.DataObject
) -> None:
    offset = data.draw(st.one_of(st.none(), st.integers(0, abs(rows - columns))))
    check(table(rows, columns, seed, levels), offset)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**16))
def test_both_directions_agree(rows: int, columns: int, seed: int) -> None:
    S = table(rows, columns, seed)
    forth, back = map_layers(S), map_layers(S.T)
    assert {n: o for o, n in forth.items()} == back
    assert list(forth) == sorted(forth) and list(forth.values()) == sorted(forth.values())
    assert len(set(forth.values())) == len(forth) == min(rows, columns)


def test_float32_similarities_are_summed_in_float64() -> None:
    for seed in range(20):
        check(table(5, 8, seed).float().double(), None)


def test_equal_depths_leave_only_the_identity() -> None:
    assert map_layers(table(4, 4, 0)) == {n: n for n in range(4)}


def test_a_smaller_offset_is_a_real_constraint() -> None:
    S = torch.zeros(2, 6)
    S[0, 4] = S[1, 5] = 1
    assert map_layers(S) == {0: 4, 1: 5}
    assert map_layers(S, max_offset=3)[0] <= 3
    assert map_layers(S, max_offset=0) == {0: 0, 1: 1}


def test_greedy_choices_lose() -> None:
    S = torch.tensor([[0.1, 0.2, 1.0, 0.0], [0.0, 0.9, 0.0, 0.1], [0.0, 0.0, 0.9, 0.1]])
    assert map_layers(S) == {0: 0, 1: 1, 2: 2}


@pytest.mark.parametrize(("rows", "columns"), [(3, 6), (6, 3)])
def test_ties_go_to_the_smallest_shift(rows: int, columns: int) -> None:
    first = map_layers(torch.full((rows, columns), 0.5))
    assert first == {n: n for n in range(3)}
    for _ in range(3):
        assert map_layers(torch.full((rows, columns), 0.5)) == first


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 2**16))
def test_among_the_best_maps_the_last_layer_goes_least_far(rows: int, columns: int, seed: int) -> None:
    S = table(rows, columns, seed, levels=2)
    _, maps = oracle.best_layers(S)
    grow = rows <= columns
    shifts = [tuple(sorted(m.values() if grow else m.keys(), reverse=True)) for m in maps]
    ours = map_layers(S)
    assert tuple(sorted(ours.values() if grow else ours.keys(), reverse=True)) == min(shifts)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("first", {0: 0, 1: 1, 2: 2}), ("middle", {0: 2, 1: 3, 2: 4}), ("last", {0: 4, 1: 5, 2: 6})],
)
def test_the_ablation_strategies(strategy: str, expected: dict[int, int]) -> None:
    S = table(3, 7, 0)
    assert map_layers(S, strategy) == expected  # type: ignore[arg-type]
    assert map_layers(S.T, strategy) == {n: o for o, n in expected.items()}  # type: ignore[arg-type]


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'middle'\?"):
        map_layers(table(2, 3, 0), "midle")  # type: ignore[arg-type]
    for offset in (-1, 2):
        with pytest.raises(ConfigError, match=r"outside 0 … 1"):
            map_layers(table(2, 3, 0), max_offset=offset)
    broken = table(2, 3, 0)
    broken[1, 1] = float("nan")
    with pytest.raises(LoRASuiteError, match="NaN"):
        map_layers(broken)
