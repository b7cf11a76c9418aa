"""A search on a tiny model: what it costs, going on after a kill, the same again, never worse than a start."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorasuite.data import _encoding, split_rows
from lorasuite.errors import NumericalError, Problem
from lorasuite.training import (
    EXTENTS,
    FinetuneResult,
    FinetuneSettings,
    Search,
    Start,
    _trainer,
    search,
    validation_loss,
)
from lorasuite.training import _search as module
from tests.integration.tiny import digit_rows, tiny_lora, tiny_model, tiny_tokenizer

SETTINGS = FinetuneSettings(batch_size=4, epochs=2, learning_rate=1e-3)
ROWS = split_rows(digit_rows(20), seed=SETTINGS.seed)


def run(tmp_path: Path, name: str, effort: str = "normal", **changes: Any) -> tuple[FinetuneResult, Search]:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    bare = validation_loss(model, tokenizer, ROWS.to_choose_by, SETTINGS.cutoff, 16)
    starts = {"fresh": Start(ROWS, bare, lora=tiny_lora()), "other": Start(ROWS, bare, lora=tiny_lora())}
    return search(
        model, tokenizer, changes.get("starts", starts), SETTINGS, EXTENTS[effort], bare=bare,
        output=tmp_path / name, work_dir=tmp_path / f"{name}-work",
    )  # fmt: skip


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


def counting(monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> list[dict[str, Any]]:
    """The named arguments of every call of a function from here on."""
    calls: list[dict[str, Any]] = []
    true = getattr(where, name)

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(named)
        return true(*arguments, **named)

    monkeypatch.setattr(where, name, counted)
    return calls


@pytest.mark.parametrize("effort", ["normal", "thorough"])
def test_a_search_costs_what_its_effort_says(tmp_path: Path, effort: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenized = counting(monkeypatch, _encoding, "encode_pair")
    measured = counting(monkeypatch, _trainer, "activation_bytes")
    tuned = counting(monkeypatch, module, "finetune")
    result, found = run(tmp_path, "out", effort)
    # nothing is computed twice: each row is tokenized once (those held out once more, for the bare base's loss), what
    # fits into the memory is measured once a start, and what a start loses, where nobody says it, once a start and fold
    tried = {arm.start for arm in found.arms}
    assert len(tokenized) == len({*ROWS.trained}) + len({*ROWS.to_choose_by}) and len(measured) == len(tried) == 2
    unknown = [named for named in tuned[:-1] if named["start_loss"] is None]
    assert len(unknown) == (0 if effort == "normal" else 2 * 3) < len(tuned) - 1
    assert result.samples == 20, "the winner is trained on all rows"
    assert found.cost == (found.steps + result.steps) / 10 <= EXTENTS[effort].budget  # type: ignore[index]
    assert found.held_out == (4 if effort == "normal" else 12)
    winner = found.arms[0]
    assert (winner.start, winner.learning_rate) == (found.start, found.learning_rate)
    assert max(winner.losses) == found.schedule == 8, "the winner's run was followed to its end"
    assert winner.losses[8] is not None and winner.losses[8] < winner.losses[0]  # type: ignore[operator]
    assert len({(arm.start, arm.learning_rate) for arm in found.arms}) == len(found.arms) > 1
    assert not (tmp_path / "out-work").exists()


@pytest.mark.parametrize(
    ("effort", "losses", "tried"),
    [
        ("normal", {1e-3: 1.0, 3e-3: 2.0, 1e-2: 0.5}, [1e-3, 3e-3]),
        ("normal", {1e-3: 2.0, 3e-3: 1.0, 1e-2: 1.5}, [1e-3, 3e-3, 1e-2]),
        ("thorough", {1e-3: 3.0, 3e-3: 2.0, 1e-2: 1.0, 3e-2: 0.5}, [1e-3, 3e-3, 1e-2, 3e-2]),
        ("thorough", {1e-3: 3.0, 3e-3: 2.0, 1e-2: math.inf, 3e-2: 0.5}, [1e-3, 3e-3, 1e-2]),
    ],
)
def test_rates_of_a_lone_start_are_tried_upwards_until_one_is_worse(
    effort: str, losses: dict[float, float], tried: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def tune(base: Any, tokenizer: Any, rows: Any, settings: FinetuneSettings, **named: Any) -> FinetuneResult:
        rate = settings.learning_rate
        seen.append(rate)
        if math.isinf(losses[rate]):
            raise NumericalError(Problem("step 1", "diverged", "Lower the rate"))
        reached = {"validation_loss": losses[rate], "validation": [{"epoch": 0, "loss": 9.0}], "steps": 10}
        return FinetuneResult.model_construct(**reached)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "finetune", tune)
    _, found = run(tmp_path, "out", effort, starts={"fresh": Start(ROWS, 9.0, lora=tiny_lora())})
    assert list(dict.fromkeys(seen)) == tried == sorted(arm.learning_rate for arm in found.arms)
    assert found.learning_rate == min(tried, key=losses.__getitem__) == seen[-1]


def test_of_many_rows_some_are_compared_on_and_all_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search costs what it would cost with as many rows as it compares on; what it reads is spread over all."""
    monkeypatch.setattr(module, "MOST_COMPARED", 10)
    seen: list[list[int]] = []
    true = module.finetune

    def tune(base: Any, tokenizer: Any, rows: Any, settings: FinetuneSettings, **named: Any) -> FinetuneResult:
        seen.append([ROWS.trained.index(row) for row in rows])
        return true(base, tokenizer, rows, settings, **named)

    monkeypatch.setattr(module, "finetune", tune)
    result, found = run(tmp_path, "out")
    *compared, final = seen
    assert all(one == compared[0] for one in compared) and len(compared[0]) == 8
    assert min(compared[0]) < 4 and max(compared[0]) > 14, "neither the first rows nor the last alone"
    assert not {ROWS.trained[n] for n in compared[0]} & {*ROWS.to_choose_by}
    assert len(final) == result.samples == 20
    assert found.schedule == 4 and found.steps <= 1.5 * 6, "six steps are two epochs of ten rows"


def test_a_killed_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was finished is trained again, and the result is the same bit for bit."""
    whole, found = run(tmp_path, "whole")
    true = module.finetune
    calls: list[tuple[float, Any]] = []

    def until(limit: int) -> Any:
        def tune(base: Any, tokenizer: Any, rows: Any, settings: FinetuneSettings, **named: Any) -> FinetuneResult:
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append((settings.learning_rate, named.get("pause_at")))
            return true(base, tokenizer, rows, settings, **named)

        return tune

    monkeypatch.setattr(module, "finetune", until(4))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "killed")
    monkeypatch.setattr(module, "finetune", until(99))
    again, same = run(tmp_path, "killed")
    assert len(calls) == 1 + sum(len(stops) for stops in _stops(found)), calls
    assert same == found and again.losses == whole.losses
    for name, tensor in tensors(tmp_path / "whole").items():
        assert torch.equal(tensor, tensors(tmp_path / "killed")[name]), name


def _stops(found: Search) -> list[set[int]]:
    """The steps at which each arm was paused: those of its losses that no other arm's epochs explain."""
    plan = module.rounds(len(found.arms), found.schedule, 15)
    return [{stop for _, stop in plan if stop <= max(arm.losses)} for arm in found.arms]


def test_no_start_is_made_worse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every epoch makes the held-out rows worse, the start is written as it is."""
    losses = iter(range(5, 1000))
    monkeypatch.setattr("lorasuite.training._finetune.validation_loss", lambda *_: float(next(losses)))
    result, found = run(tmp_path, "out", starts={"fresh": Start(ROWS, 4.0, lora=tiny_lora())})
    assert (found.epochs, result.steps) == (0, 0)
    assert all(float(t.abs().max()) == 0 for name, t in tensors(tmp_path / "out").items() if "lora_B" in name)


def test_what_a_start_loses_is_not_measured_again(tmp_path: Path) -> None:
    starts = {"fresh": Start(ROWS, 99.0, lora=tiny_lora()), "other": Start(ROWS, 98.0, lora=tiny_lora())}
    _, found = run(tmp_path, "out", starts=starts)
    assert {(arm.start, arm.losses[0]) for arm in found.arms} == {("fresh", 99.0), ("other", 98.0)}
