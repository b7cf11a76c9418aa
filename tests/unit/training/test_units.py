"""Spans that two tokenizers cut alike, and token weights by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorasuite.data import IGNORED, Message, Row, encode_rows
from lorasuite.training import (
    FinetuneSettings,
    RowAligner,
    TokenWeights,
    excess_weights,
    finetune,
    label_losses,
)
from lorasuite.training._units import AlignedRow, units
from tests.integration.tiny import digit_rows, tiny_lora, tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([b" card", b"_pay"], [b" card", b"_", b"pay"], [(1, 1), (1, 2)]),
        ([b" h", b"\xc3", b"\xa9l", b"lo"], [b" h", b"\xc3\xa9l", b"l", b"o"], [(1, 1), (2, 1), (1, 2)]),
        ([b" a", b"b", b""], [b" ab", b""], [(2, 1), (1, 1)]),  # the end of the text pairs with the end
        ([b"", b"a"], [b"a"], [(2, 1)]),  # one has a token without text that the other lacks
        ([b" ", b"a"], [b"a"], [(2, 1)]),  # a space that one adds at the very beginning
        ([b"a", b"b"], [b"a", b"b", b"c"], [(1, 1), (1, 1)]),  # one was cut off
        ([b"a", b""], [b"a", b"<|", b"end|>"], [(1, 1)]),  # an end that the other writes as text
        ([b"a", b"bc"], [b"a", b"xc"], []),  # not the same text
        ([b"ab"], [b"a"], []),
        ([b""], [b""], [(1, 1)]),
    ],
)
def test_units_end_where_both_end(old: list[bytes], new: list[bytes], expected: list[tuple[int, int]]) -> None:
    found = units(old, new)
    assert [(len(theirs), len(ours)) for theirs, ours in found] == expected
    for theirs, ours in found:
        texts = [b"".join(tokens[part.start : part.stop]) for tokens, part in ((old, theirs), (new, ours))]
        assert texts[0].lstrip() == texts[1].lstrip()


def test_only_labels_are_in_units_and_prompts_need_not_be_alike() -> None:
    old, new = tiny_tokenizer(bos=False, chat=True), tiny_tokenizer(chat=True)
    new.chat_template = new.chat_template.replace("'<s>' + ", "'<s>say ' + ")
    chat = Row(kind="messages", messages=(Message("user", "add one"), Message("assistant", "two three")))
    text = Row(kind="text", text="one two")
    for one, labels in ((chat, 3), (text, 3)):
        (found,) = RowAligner(old, new, 64)([one])
        assert len(found.old["input_ids"]) < len(found.new["input_ids"])
        assert all(found.new["labels"][t] != IGNORED for _, ours in found.units for t in ours)
        assert all(found.old["labels"][t] != IGNORED for theirs, _ in found.units for t in theirs)
        assert 0 < len(found.units) <= labels


def test_weights_follow_the_excess_by_units() -> None:
    """A unit's excess is its old tokens' sum, spread over its new ones; half of the weight stays even."""
    tokens = {"input_ids": [1, 5, 6, 7], "labels": [IGNORED, 5, 6, 7], "attention_mask": [1] * 4}
    shorter = {"input_ids": [1, 8, 9], "labels": [IGNORED, 8, 9], "attention_mask": [1] * 3}
    rows = [
        AlignedRow(tokens, shorter, [(range(1, 3), range(1, 2)), (range(3, 4), range(2, 3))]),
        AlignedRow(shorter, tokens, [(range(1, 2), range(1, 3)), (range(2, 3), range(3, 4))]),
    ]
    bare = [torch.tensor([0.0, 2.0, 1.5, 1.0]), torch.tensor([0.0, 4.0, 1.0])]
    tuned = [torch.tensor([0.0, 1.0, 0.5, 3.0]), torch.tensor([0.0, 1.0, 0.0])]
    found = excess_weights(rows, bare, tuned)
    excess = torch.tensor([2.0, 0.0, 1.5, 1.5, 1.0])  # of the five labels; what the adapter made worse counts as none
    batch = found.batch([shorter, tokens, {"input_ids": [3]}])["token_weights"]
    labels = torch.cat([batch[0, :2], batch[1, :3]])
    assert torch.allclose(labels, (1 + excess / excess.mean()) / 2) and float(labels.mean()) == pytest.approx(1)
    assert bool((batch[2] == 1).all()), "rows that are not known count evenly"
    assert TokenWeights.from_tensors(found.tensors()).digest() == found.digest()
    even = excess_weights(rows, bare, bare)
    assert bool((even.weights == 1).all()), "an adapter that changes nothing has nothing to weigh by"


def test_finetuning_weighs_its_tokens(tmp_path: Path) -> None:
    """The first step's loss is the weighted one; the held-out loss never is."""
    model, tokenizer, rows = tiny_model(), tiny_tokenizer(), digit_rows(4)
    examples = encode_rows(rows, tokenizer).examples
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    tokens = torch.tensor([token for example in examples for token in example["input_ids"]])
    weights = TokenWeights(tokens, lengths, torch.linspace(0.5, 1.5, len(tokens)))
    losses = torch.cat([one.roll(-1) for one in label_losses(model, examples)])  # of the label after each token
    labels = sum(label != IGNORED for example in examples for label in example["labels"])
    settings = FinetuneSettings(batch_size=4, micro_batch_size=2, max_steps=1, precision="fp32")
    result = finetune(
        model, tokenizer, rows, settings, adapter=None, lora=tiny_lora(), output=tmp_path / "out",
        work_dir=tmp_path / "work", validation_rows=rows, token_weights=weights,
    )  # fmt: skip
    assert result.losses[0]["loss"] == pytest.approx(float((losses * weights.weights).sum()) / labels, rel=1e-4)
    assert result.validation[0]["loss"] == pytest.approx(float(losses.sum()) / labels, rel=1e-4)
