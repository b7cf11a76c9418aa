"""The pair that the zoo has not, and how a model is scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.zoo import train as trained
from lorasuite import zoo

#: An implicit upgrade: llama's old base, trained further.
FURTHER = "further"
FURTHER_STEPS = 300


def scores(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> dict[str, float]:
    """Share of rows answered exactly, and loss in nats a token."""
    return {
        "exact_match": sum(trained.correct(model, tokenizer, rows)) / len(rows),
        "loss": trained.validation_loss(model, tokenizer, rows),
    }


def further_base(folder: Path) -> Path:
    """Llama's old base, trained further."""
    if not (folder / "config.json").exists():
        torch.manual_seed(7)
        model, tokenizer = trained.load(zoo.pair("llama").old, "cpu")
        trained.train(
            model, trained.base_batches(tokenizer, set(), 77, False), FURTHER_STEPS, 1e-3, tokenizer.pad_token_id, print
        )
        model.save_pretrained(folder)
        trained._save_tokenizer(tokenizer, folder)
    return folder
