"""Log-likelihoods with the head at answers only are those of lm-eval, which reads all logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from lorasuite.evaluation._harness import evaluation_tokenizer, lm_class
from lorasuite.training import LabelHead
from tests import models


def requests(size: int) -> list[tuple[Any, list[int], list[int]]]:
    """Answers of several lengths, choices of one token, the same asked twice, a row that is cut off on the left."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(5, size, (count,), generator=generator).tolist()  # type: ignore[no-any-return]

    shared = tokens(6)
    found = [(tokens(length), tokens(answer)) for length, answer in ((4, 3), (9, 1), (1, 7), (40, 5), (2, 1))]
    found += [(shared, [choice]) for choice in (5, 6, 7, 8)]
    found += [(shared, [*found[0][1], 9]), (shared + found[0][1], [9]), found[1]]
    return [((f"asked {n}", ""), *one) for n, one in enumerate(found)]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_as_lm_eval_reads_them(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = models.build(tmp_path / "base", family)
    model = models.load_tuned(models.build_adapter(tmp_path / "adapter", path), path).eval()
    tokenizer = evaluation_tokenizer(models.tokenizer_of(path), generate=False)
    lm = lm_class()(model, tokenizer, 3, special=True)
    monkeypatch.setattr(lm, "_max_length", 24)
    asked = requests(int(model.config.get_text_config().vocab_size))
    counted: list[Any] = []
    monkeypatch.setattr(lm.cache_hook, "add_partial", lambda _, said, answer: counted.append((said, answer)))
    found = lm._loglikelihood_tokens(asked)
    assert sorted(counted) == sorted(zip([one[0] for one in asked], found, strict=True))
    counted.clear()
    # With its cache lm-eval takes an answer's first token for the last of one that a longer answer ends with.
    monkeypatch.setattr(lm, "logits_cache", False)
    expected = HFLM._loglikelihood_tokens(lm, asked, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    torch.testing.assert_close(torch.tensor(found)[:, 0], torch.tensor(expected)[:, 0], rtol=1e-5, atol=1e-5)


def test_choices_of_one_token_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = models.build(tmp_path / "base", "llama")
    model = models.load_tuned(models.build_adapter(tmp_path / "adapter", path), path).eval()
    lm = lm_class()(model, evaluation_tokenizer(models.tokenizer_of(path), generate=False), 8, special=True)
    rows: list[int] = []
    states = LabelHead.states

    def counted(self: LabelHead, batch: Any) -> Any:
        rows.append(len(batch["input_ids"]))
        return states(self, batch)

    monkeypatch.setattr(LabelHead, "states", counted)
    lm._loglikelihood_tokens([(None, [5, 6, 7], [choice]) for choice in (8, 9, 10, 11)])
    assert rows == [1]
