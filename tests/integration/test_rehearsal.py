"""Texts of the base's own beside the rows of a fine-tune: what is written, and what is read of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorasuite.adapters import attach_adapter
from lorasuite.data import IGNORED, UNFINISHED, Row, encode, split_rows
from lorasuite.teacher import own_texts
from lorasuite.training import FinetuneSettings, finetune, finetune_swept, rehearsed, validation_loss
from lorasuite.training._rehearsal import LABELLED, thinned
from tests.integration.tiny import digit_rows, tiny_lora, tiny_model, tiny_tokenizer

SETTINGS = FinetuneSettings(batch_size=4, epochs=2, learning_rate=5e-2)


def written(count: int = 8, seed: int = 1, batch_size: int = 64) -> list[Row]:
    return own_texts(tiny_model(), tiny_tokenizer(), count, 6, seed=seed, batch_size=batch_size)


def test_a_text_is_drawn_by_its_number_and_the_seed() -> None:
    texts = written()
    assert texts and all(row.kind == "text" and row.text.strip() for row in texts)
    assert all(len(tiny_tokenizer()(row.text, add_special_tokens=False)["input_ids"]) <= 6 for row in texts)
    assert any(row.extra.get(UNFINISHED) for row in texts)  # no end is taught that the base did not write
    assert texts == written(batch_size=3) and texts[:3] == written(4)[:3] != written(4, seed=2)[:3]
    told: list[tuple[int, int]] = []
    own_texts(tiny_model(), tiny_tokenizer(), 5, 6, seed=1, batch_size=2, progress=lambda *at: told.append(at))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_one_token_in_four_is_a_label() -> None:
    plain = [{"input_ids": [1, *range(10, 18)], "labels": [IGNORED, *range(10, 18)]} for _ in range(LABELLED)]
    found = thinned(plain)
    labels = [[label for label in text["labels"] if label != IGNORED] for text in found]
    assert labels == [[13, 17], [10, 14], [11, 15], [12, 16]]
    assert [text["input_ids"] for text in found] == [text["input_ids"] for text in plain]
    assert thinned([{"input_ids": [1, 2], "labels": [IGNORED, 2]}]) == []  # its only label is not that one


def test_texts_are_a_share_of_the_rows() -> None:
    texts = [Row("text", text=str(n)) for n in range(10)]
    assert [len(rehearsed(texts, share, 20)) for share in (0.0, 0.01, 0.125, 1.0)] == [0, 1, 3, 10]
    assert rehearsed(texts, 0.2, 20) == texts[:4]


def test_texts_are_read_beside_the_rows(tmp_path: Path) -> None:
    rows, texts = digit_rows(12), written(12)

    def after(name: str, texts: list[Row]) -> float:
        result = finetune(
            tiny_model(), tiny_tokenizer(), rows, SETTINGS.model_copy(update={"epochs": 10}), adapter=None,
            lora=tiny_lora(), output=tmp_path / name, work_dir=tmp_path / "work", rehearsal=texts,
        )  # fmt: skip
        kept = thinned(encode(texts, tiny_tokenizer())) if texts else []
        assert (result.samples, result.rehearsed) == (len(rows), len(kept)) and (not texts or kept)
        assert result.steps == 10 * -(-(len(rows) + len(kept)) // 4)
        with torch.no_grad():
            tuned = attach_adapter(tiny_model(), tmp_path / name)
            return validation_loss(tuned, tiny_tokenizer(), written(12), 256, 8)

    assert after("beside", texts) < after("without", []) - 0.02


def test_rates_are_compared_without_them(tmp_path: Path) -> None:
    rows = split_rows(digit_rows(30), [], [], seed=1)
    found = {}
    for name, texts in (("without", []), ("beside", written())):
        found[name] = finetune_swept(
            tiny_model(), tiny_tokenizer(), rows, SETTINGS, [1e-3, 5e-3], adapter=None, lora=tiny_lora(),
            output=tmp_path / name, work_dir=tmp_path / f"work-{name}", rehearsal=texts,
        )  # fmt: skip
    (plain, first), (result, second) = found["without"], found["beside"]
    assert first == second and (plain.rehearsed, bool(result.rehearsed)) == (0, True)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in found)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("texts", [[], [Row("text", text="1")]])
def test_no_text_is_no_error(tmp_path: Path, texts: list[Row]) -> None:
    """A base that writes nothing has nothing to rehearse."""
    result = finetune(
        tiny_model(), tiny_tokenizer(), digit_rows(), SETTINGS, adapter=None, lora=tiny_lora(), output=tmp_path / "out",
        work_dir=tmp_path / "work", rehearsal=texts,
    )  # fmt: skip
    assert result.samples == len(digit_rows()) and result.rehearsed <= len(texts)
