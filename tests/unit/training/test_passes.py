"""A step's rows by forward pass, and passes that fit into memory."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from lorasuite.training import FinetuneResult, FinetuneSettings, LabelHead, finetune
from lorasuite.training import _trainer as trainer
from lorasuite.training._passes import activation_bytes, free_memory, passes, rows_that_fit
from tests.integration.tiny import digit_rows, tiny_lora, tiny_model, tiny_tokenizer

SETTINGS = FinetuneSettings(batch_size=8, epochs=2, learning_rate=5e-3)


def tune(output: Path, settings: FinetuneSettings = SETTINGS) -> FinetuneResult:
    return finetune(
        tiny_model(), tiny_tokenizer(), digit_rows(8), settings,
        adapter=None, lora=tiny_lora(), output=output, work_dir=output.parent / "work",
    )  # fmt: skip


def cost(division: list[list[int]], lengths: list[int], overhead: int) -> int:
    return sum(overhead + len(part) * max(lengths[n] for n in part) for part in division)


def test_the_division_is_the_cheapest_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for most, overhead in itertools.product((1, 2, 6), (0, 3, 100)):
        lengths = torch.randint(1, 20, (6,), generator=generator).tolist()
        found = passes(lengths, most, overhead)
        assert sorted(n for part in found for n in part) == list(range(6))
        assert max(map(len, found)) <= most and lengths[found[0][0]] == max(lengths)
        order = sorted(range(6), key=lambda n: -lengths[n])
        cuts = itertools.chain.from_iterable(itertools.combinations(range(1, 6), k) for k in range(6))
        others = [[order[a:b] for a, b in itertools.pairwise((0, *cut, 6))] for cut in cuts]
        allowed = [one for one in others if max(map(len, one)) <= most]
        assert cost(found, lengths, overhead) == min(cost(one, lengths, overhead) for one in allowed)


def test_activations_grow_with_tokens_and_checkpointing_keeps_few() -> None:
    model = get_peft_model(tiny_model(), tiny_lora()).train()
    head = LabelHead(model)

    def taken(tokens: int) -> int:
        return activation_bytes(head, {"input_ids": torch.ones(1, tokens, dtype=torch.long)})

    assert taken(16) == pytest.approx(2 * taken(8), rel=0.2)
    # two layers: 13 states of the hidden size at least, of each token, in float32
    assert taken(32) > 2 * 13 * 32 * 32 * 4
    whole = taken(32)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert taken(32) < whole / 4
    assert rows_that_fit(2**30, 10 * 2**30) == 6 and rows_that_fit(2**30, 2**30) == 0
    assert 0 < free_memory(torch.device("cpu")) < 2**45


def test_measuring_leaves_nothing_in_memory() -> None:
    head = LabelHead(get_peft_model(tiny_model(), tiny_lora()).train())

    def living() -> int:
        activation_bytes(head, {"input_ids": torch.ones(1, 8, dtype=torch.long)})
        gc.collect()
        return sum(type(it) in (torch.Tensor, torch.nn.Parameter) for it in gc.get_objects())

    assert living() == living()


def test_memory_that_runs_out_halves_the_passes_and_changes_rounding_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(tmp_path / "whole")
    assert whole.micro_batch_size == 8
    plain, seen = trainer.AdapterTrainer.compute_loss, []

    def tight(self: Any, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        seen.append(len(inputs["input_ids"]))
        if len(seen) > 1 and len(inputs["input_ids"]) > 2:  # in the second pass, after gradients of the first
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate much.")
        return plain(self, model, inputs, *rest, **named)

    monkeypatch.setattr(trainer.AdapterTrainer, "compute_loss", tight)
    monkeypatch.setattr(trainer, "PASS_TOKENS", {"cpu": 0})
    halved = tune(tmp_path / "halved")
    assert halved.micro_batch_size == 2 and max(seen) > 2
    assert [one["loss"] for one in halved.losses] == pytest.approx([one["loss"] for one in whole.losses], abs=1e-5)
    fixed = SETTINGS.model_copy(update={"micro_batch_size": 4})
    seen.append(0)
    with pytest.raises(RuntimeError, match="out of memory"):
        monkeypatch.setattr(trainer, "PASS_TOKENS", {"cpu": 1000})
        tune(tmp_path / "fixed", fixed)


def test_little_memory_means_few_rows_and_then_checkpointing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tune(tmp_path / "whole")
    real, bytes_of = trainer.activation_bytes, []

    def measured(*arguments: Any) -> int:
        bytes_of.append(real(*arguments))
        return bytes_of[-1]

    monkeypatch.setattr(trainer, "activation_bytes", measured)
    for rows, expected in ((3, 2), (0, 1)):
        bytes_of.clear()
        monkeypatch.setattr(trainer, "rows_that_fit", lambda row, free, rows=rows: rows if len(bytes_of) == 1 else 1)
        less = tune(tmp_path / f"rows{rows}")
        assert less.micro_batch_size == expected and len(bytes_of) == (1 if rows else 2)
        assert [one["loss"] for one in less.losses] == pytest.approx([one["loss"] for one in whole.losses], abs=1e-5)
    assert bytes_of[1] < bytes_of[0] / 3, "checkpointing was switched on"


def test_loraplus_moves_b_faster(tmp_path: Path) -> None:
    """Adam's first step is as long as the learning rate, whatever the gradient."""
    from safetensors.torch import load_file

    one_step = SETTINGS.model_copy(update={"max_steps": 1, "schedule": "constant", "learning_rate": 1e-3})
    tune(tmp_path / "plain", one_step)
    tune(tmp_path / "plus", one_step.model_copy(update={"loraplus_lr_ratio": 16.0}))
    moved = {
        name: max(float(t.abs().max()) for key, t in load_file(tmp_path / name / "adapter_model.safetensors").items()
                  if "lora_B" in key)
        for name in ("plain", "plus")
    }  # fmt: skip
    assert moved["plain"] == pytest.approx(1e-3, rel=1e-3) and moved["plus"] == pytest.approx(16e-3, rel=1e-3)


def test_bf16_on_a_cpu_is_there_when_asked_for(tmp_path: Path) -> None:
    plain, coarse = (tune(tmp_path / p, SETTINGS.model_copy(update={"precision": p})) for p in ("auto", "bf16"))
    assert (plain.precision, coarse.precision) == ("fp32", "bf16")
    assert coarse.losses[0]["loss"] == pytest.approx(plain.losses[0]["loss"], rel=2e-2)
    assert coarse.losses[0]["loss"] != plain.losses[0]["loss"]
