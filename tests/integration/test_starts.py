"""Starts of a fresh LoRA by name: what is written is a plain LoRA for the base as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft.tuners.lora.layer as peft_layer
import pytest
import torch
from peft import PeftConfig

from lorasuite.adapters import Adapter, attached
from lorasuite.errors import AdapterError, ConfigError, DataError
from lorasuite.training import FinetuneResult, FinetuneSettings, finetune
from lorasuite.training import _finetune as module
from lorasuite.training import _starts as starts
from tests.integration.tiny import digit_rows, tiny_lora, tiny_model, tiny_tokenizer

IDS = torch.tensor([[1, 3, 6, 12, 7], [1, 4, 9, 2, 11]])


def tune(tmp_path: Path, init: str, name: str = "out", **changes: Any) -> FinetuneResult:
    settings = FinetuneSettings(batch_size=4, epochs=2, learning_rate=5e-3, init=init)
    arguments = {"adapter": None, "lora": tiny_lora(), "output": tmp_path / name, "work_dir": tmp_path / "work"}
    arguments.update(changes)
    base, rows = arguments.pop("base", None) or tiny_model(), arguments.pop("rows", digit_rows())
    return finetune(base, tiny_tokenizer(), rows, settings, **arguments)


def rounded(weight: torch.Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1) -> tuple[torch.Tensor, ...]:
    """In place of PEFT's own, which needs a GPU: a coarse grid, and the SVD of what it leaves."""
    quantized = (weight * 16).round() / 16
    u, s, vh = torch.linalg.svd(weight - quantized, full_matrices=False)
    root = s[:reduced_rank].sqrt()
    return quantized, root[:, None] * vh[:reduced_rank], u[:, :reduced_rank] * root


@pytest.fixture
def loftq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_layer, "loftq_init", rounded)
    monkeypatch.setattr(starts, "_loftq_lacks", lambda: "")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq"])
def test_factors_taken_out_of_the_base_are_subtracted_again(
    init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loftq: None
) -> None:
    trained: dict[str, torch.Tensor] = {}
    write = module.save_adapter

    def spied(wrapped: Any, output: Path, **more: Any) -> None:
        with torch.no_grad():
            trained["start" if "start" not in trained else "end"] = wrapped(IDS).logits.clone()
        write(wrapped, output, **more)

    monkeypatch.setattr(module, "save_adapter", spied)
    base = tiny_model()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    result = tune(tmp_path, init, base=base)
    assert result.losses[-1]["loss"] < result.losses[0]["loss"]
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items()), "as it came"

    with torch.no_grad():
        plain = base(IDS).logits
        with attached(base, tmp_path / "out") as loaded:
            moved = loaded(IDS).logits
        assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    config = PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert config.init_lora_weights is True and config.r == 8 and config.lora_alpha == 16
    assert Adapter.open(tmp_path / "out").rank == 8, "as migrations and servers read it"
    assert (moved - plain).abs().max() > 1e-3
    if init == "loftq":  # it trains on a base that was quantized, and that part of it is not the adapter's
        rest = (trained["start"] - plain).abs().max()
        assert 0 < rest < 0.3 and (moved - trained["end"]).abs().max() < 2 * rest
    else:
        assert torch.allclose(trained["start"], plain, atol=1e-5), "begins as the bare base"
        assert torch.allclose(moved, trained["end"], atol=1e-5)


def test_eva_begins_in_the_directions_of_its_inputs(tmp_path: Path) -> None:
    base = tiny_model()
    first = tune(tmp_path, "eva", base=base)
    assert tune(tmp_path, "eva", "again").losses == first.losses
    assert first.losses != tune(tmp_path, "default", "plain").losses
    assert Adapter.open(tmp_path / "out").rank == 4
    assert not any("lora" in name for name, _ in base.named_modules())
    rows = [digit_rows()[0]]
    with pytest.raises(DataError, match="no batch has 24 tokens, which EVA needs"):
        tune(tmp_path, "eva", "short", lora=tiny_lora(r=24), rows=rows, base=base)
    assert not hasattr(base, "peft_config")


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    whole = tune(tmp_path, "pissa", "whole")
    assert tune(tmp_path, "pissa", "paused", pause_at=2).steps == 2
    rest = tune(tmp_path, "pissa", "paused")
    assert rest.resumed_from == 2 and rest.losses == whole.losses
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "paused")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("init", "lora", "error", "message"),
    [
        ("pissa", {"use_dora": True}, ConfigError, "against which a DoRA's magnitudes cannot be written"),
        ("olora", {"fan_in_fan_out": True}, ConfigError, "reads weights the other way round"),
        ("loftq", {}, ConfigError, "loftq needs a CUDA GPU"),
        ("pissa", {"r": 64}, AdapterError, "pissa found 32 directions for rank 64. Use a smaller rank"),
    ],
)
def test_what_a_start_is_not_for(
    init: str, lora: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    base = tiny_model()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(error, match=message):
        tune(tmp_path, init, base=base, lora=tiny_lora(**lora))
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not hasattr(base, "peft_config") and not list(tmp_path.iterdir())


def test_names() -> None:
    for name in ("default", "pissa", "pissa_niter_16", "olora", "loftq", "eva"):
        FinetuneSettings(init=name)
    for name in ("pisa", "pissa_niter_0", "corda"):
        with pytest.raises(ValueError, match="init"):
            FinetuneSettings(init=name)
