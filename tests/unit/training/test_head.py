"""Logits at label positions are those of the whole model, and so are losses and gradients."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lorasuite.data import IGNORED
from lorasuite.training import LabelHead, collate, label_rows, read_labels
from lorasuite.training import _head as module
from lorasuite.training._head import cross_entropies
from tests import models
from tests.integration.tiny import tiny_lora, tiny_model

#: What makes a family's head more than a matrix, where its fixture has it switched off.
HEADS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"final_logit_softcapping": 2.0}, "gemma2": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 3.0}, "cohere": {"logit_scale": 0.3}, "cohere2": {"logit_scale": 0.3},
}  # fmt: skip


def examples(size: int = 90) -> list[dict[str, list[int]]]:
    """Rows of several lengths, with labels here and there."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (9, 4, 6):
        ids = torch.randint(5, size, (length,), generator=generator).tolist()
        labels = [IGNORED if n % 3 < 2 else token for n, token in enumerate(ids)]
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * length})
    return rows


def whole(model: Any) -> torch.Tensor:
    """The summed loss as the whole logits give it."""
    batch = collate(examples(int(model.config.get_text_config().vocab_size)))
    labels = batch.pop("labels")
    logits = model(**batch).logits
    return functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="sum"
    )


def at_labels(model: Any) -> tuple[LabelHead, torch.Tensor]:
    """The summed loss of label positions, and the head it was read with."""
    batch = collate(examples(int(model.config.get_text_config().vocab_size)))
    at, positions, targets = label_rows(batch.pop("labels"))
    head = LabelHead(model)
    return head, head.map(head.states(batch)[at, positions], cross_entropies, targets).sum()


def check(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients are those of the whole logits, in one chunk and in several, and the head is apart."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = whole(model)
    gradients = torch.autograd.grad(expected, trained, allow_unused=True)
    for chunk in (module.CHUNK, 200):  # 200: two positions of 96 logits at once
        monkeypatch.setattr(module, "CHUNK", chunk)
        head, found = at_labels(model)
        assert head.apart
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-4)
        for one, other in zip(torch.autograd.grad(found, trained, allow_unused=True), gradients, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=2e-4, atol=1e-5 * float(other.abs().max()) + 1e-7)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_familys_head(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {} if family in models.MULTIMODAL else HEADS.get(family, {})
    path = models.build(tmp_path / "base", family, **extra)
    model = models.load_tuned(models.build_adapter(tmp_path / "adapter", path), path).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    check(model, monkeypatch)


@pytest.mark.parametrize(
    "lora",
    [
        tiny_lora(target_modules=["q_proj", "lm_head"], init_lora_weights=False),
        tiny_lora(target_modules=["q_proj", "lm_head"], init_lora_weights=False, use_dora=True),
        tiny_lora(modules_to_save=["lm_head"]),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [3, 5]}),
    ],
    ids=["lora", "dora", "whole", "tokens"],
)
def test_an_adapter_on_the_head(lora: LoraConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(get_peft_model(tiny_model(), lora).eval(), monkeypatch)


class Doubled(torch.nn.Module):
    """A model that does to its logits what no known family does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model()
        self.config = self.inner.config

    def get_output_embeddings(self) -> Any:
        return self.inner.lm_head

    def forward(self, **batch: Any) -> Any:
        return SimpleNamespace(logits=self.inner(**batch).logits * 2)


def test_a_head_that_does_more_is_left_in_the_model() -> None:
    model = Doubled().eval()
    head, found = at_labels(model)
    assert not head.apart
    torch.testing.assert_close(found, whole(model))


def test_no_tensor_holds_the_logits_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model(), examples(40)
    width = model.config.vocab_size
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, output: seen.append(output.shape[:-1].numel()))
    monkeypatch.setattr(module, "CHUNK", 2 * width)
    found = list(read_labels(model, rows, 2))
    labels = sum(label != IGNORED for row in rows for label in row["labels"])
    assert sum(len(part.targets) for part in found) == labels and max(seen) == 2
    assert sum(seen) == labels + 2, "and one position of each batch for the model itself"
    for part in found:
        for example, position, target in zip(part.examples, part.positions, part.targets, strict=True):
            assert rows[example]["labels"][position + 1] == target


def test_the_head_is_never_copied_to_read_the_one_position(tmp_path: Path) -> None:
    """A batched product with the head's weight copies all of it: in 16 bits on a CPU that took most of a step."""
    path = models.build(tmp_path / "base", "llama")
    model = models.load_tuned(models.build_adapter(tmp_path / "adapter", path), path)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    shape = model.get_output_embeddings().weight.shape

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.bmm.default:
                assert sorted(args[1].shape[-2:]) != sorted(shape), args[1].shape
            return func(*args, **(kwargs or {}))

    with Products():
        head, _ = at_labels(model)
    assert head.apart
