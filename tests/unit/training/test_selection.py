"""A scale as it is measured, and as it is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model

from lorasuite.adapters import attached, save_adapter
from lorasuite.training import NOTHING, Candidate, choose, validation_loss, write_scaled
from tests.integration.tiny import digit_rows, tiny_lora, tiny_model, tiny_tokenizer

KINDS: dict[str, LoraConfig] = {
    "lora": tiny_lora(init_lora_weights=False),
    "lora with a bias": tiny_lora(init_lora_weights=False, lora_bias=True),
    "dora": tiny_lora(init_lora_weights=False, use_dora=True),
    "adalora": AdaLoraConfig(init_r=4, total_step=1, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    "embeddings": tiny_lora(init_lora_weights=False, target_modules=["embed_tokens", "q_proj"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_measured_is_the_scale_written(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(), KINDS[kind])
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(model, tmp_path / "adapter")
    base, tokenizer, rows = tiny_model(), tiny_tokenizer(), digit_rows(6)
    tried = choose(base, tokenizer, {"it": tmp_path / "adapter"}, rows, scales=(0.0, 0.5, 3.0))
    measured = {candidate.scale: candidate.loss for candidate in tried if candidate.method == "it"}
    assert set(measured) == {0.0, 0.5, 1.0, 3.0} and len({*measured.values()}) == 4
    for scale, loss in measured.items():
        written = write_scaled(tmp_path / "adapter", tmp_path / f"scaled-{scale}", scale)
        with attached(base, written) as wrapped:
            assert validation_loss(wrapped, tokenizer, rows, 256, 16) == pytest.approx(loss, rel=1e-6)
    bare = next(candidate for candidate in tried if candidate.method == NOTHING)
    if kind != "dora":  # its magnitudes stay
        assert measured[0.0] == pytest.approx(bare.loss, rel=1e-5), "at scale 0 nothing of the update is left"
    assert bare.model_dump(mode="json") == {"method": NOTHING, "scale": 0.0, "loss": bare.loss}
    assert tried == sorted(tried, key=lambda candidate: candidate.loss) and isinstance(bare, Candidate)
