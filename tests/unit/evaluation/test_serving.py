"""The rules of the loaders people serve with, on adapters as lorasuite and PEFT write them."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lorasuite.adapters import CONFIG, WEIGHTS
from lorasuite.bases import load_model, load_tokenizer, release_models
from lorasuite.data import Row
from lorasuite.evaluation import LLAMA_CPP_ARCHITECTURES, TEXT, VLLM_ARCHITECTURES, check, compare_merged
from lorasuite.evaluation._serving import SERVED_ROWS
from tests import models

Base = Callable[..., Path]
#: Families that a loader does not take (the fixture of llama4 is its causal class, which vLLM does not name).
VLLM_NOT = {
    "gpt_neox",
    "bloom",
    "gpt2",
    "stablelm",
    "ministral",
    "ministral3",
    "llama4_text",
    "llama4",
    "gemma3n_text",
    "exaone_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "gemma4_unified",
    "gemma4_unified_text",
}
LLAMA_CPP_NOT = {"opt", "ministral", "gpt2", "exaone_moe", "gemma4_text", "gemma4_unified", "gemma4_unified_text"}


def changed(
    adapter: Path, target: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None
) -> Path:
    shutil.copytree(adapter, target)
    settings = json.loads((adapter / CONFIG).read_text()) | config
    (target / CONFIG).write_text(json.dumps(settings))
    if tensors:
        save_file({**load_file(adapter / WEIGHTS), **tensors}, target / WEIGHTS)
    return target


@pytest.mark.parametrize("family", models.FAMILIES)
def test_families(family: str, base: Base, lora: Base) -> None:
    if family == "minicpm":  # its own code names its class as the Hub's does
        pytest.skip("a stand-in for remote code")
    model = base(family)
    found = check(lora(model), model)
    assert found["vllm"].ok == (family not in VLLM_NOT), found["vllm"].problems
    assert found["llama.cpp"].ok == (family not in LLAMA_CPP_NOT), found["llama.cpp"].problems
    if family in VLLM_NOT:
        assert any("no LoRA support" in problem for problem in found["vllm"].problems)


@pytest.mark.parametrize(
    "config, vllm, llama_cpp",
    [
        ({"use_dora": True}, "DoRA", None),
        ({"bias": "lora_only"}, "biases", None),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save", None),
        ({"trainable_token_indices": [1]}, "trainable_token_indices", None),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "updates of experts", "updates of experts"),
        ({"peft_type": "ADALORA"}, "ADALORA", None),
        ({"r": 1000}, "above 512", None),
        ({"use_rslora": True}, None, "rsLoRA"),
        ({"alpha_pattern": {"q_proj": 3}}, "another scale", "alpha_pattern"),
        # as written, the config's r is that of no module: vLLM scales by it, llama.cpp by each B's own
        ({"r": 4}, "another scale", None),
    ],
)
def test_settings(
    config: dict[str, Any], vllm: str | None, llama_cpp: str | None, base: Base, lora: Base, tmp_path: Path
) -> None:
    model = base("llama")
    found = check(changed(lora(model), tmp_path / "a", config), model)
    for loader, words in (("vllm", vllm), ("llama.cpp", llama_cpp)):
        said = "; ".join(found[loader].problems)
        assert found[loader].ok == (words is None), said
        assert words is None or words in said


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias",
        "base_model.model.lm_head.weight",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight",
    ],
)
def test_names(name: str, base: Base, lora: Base, tmp_path: Path) -> None:
    model = base("llama")
    found = check(changed(lora(model), tmp_path / "a", {}, {name: torch.zeros(3, 4)}), model)
    assert not found["vllm"].ok and not found["llama.cpp"].ok


def test_larger_ranks_are_told(base: Base, lora: Base) -> None:
    model = base("llama")
    found = check(lora(model, rank=20, alpha=20, targets=["q_proj"]), model)["vllm"]
    assert found.ok and found.notes == ["--max-lora-rank 32 (16 if it is not given)"]


def test_a_tied_unembedding(base: Base, lora: Base) -> None:
    model = base("llama", tie_word_embeddings=True)
    found = check(lora(model, targets=["q_proj", "lm_head"]), model)
    assert any("tied" in problem for problem in found["llama.cpp"].problems)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "phi3", "gemma2", "qwen2_moe"])
def test_merged_it_is_a_plain_model(family: str, base: Base, lora: Base, tmp_path: Path) -> None:
    model, adapter = base(family), lora(base(family))
    found = compare_merged(model, adapter)
    assert found["peft"].ok and found["transformers"].ok, found

    merged = PeftModel.from_pretrained(models.load(model), str(adapter)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids = torch.tensor([load_tokenizer(model)(TEXT)["input_ids"]])
    with torch.inference_mode():
        wanted = models.load_tuned(adapter, model).eval()(input_ids=ids).logits
        bare = models.load(model)(input_ids=ids).logits
        found_logits = again(input_ids=ids).logits
    torch.testing.assert_close(found_logits, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert not torch.allclose(bare, wanted, atol=1e-3)


def test_an_adapter_that_changes_nothing(base: Base, lora: Base, tmp_path: Path) -> None:
    model = base("llama")
    tensors = {n: t * 0 if "lora_B" in n else t for n, t in load_file(lora(model) / WEIGHTS).items()}
    found = compare_merged(model, changed(lora(model), tmp_path / "a", {}, tensors))
    for loader in ("peft", "transformers"):
        assert found[loader].ran and found[loader].problems == ["it loads, and answers as the base does"]


def test_what_is_compared_are_the_answers_of_rows(base: Base, lora: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that answers are read from and no others, of the first rows; a difference there is found."""
    model = base("llama")
    words = [" ".join(models.words(120)[n : n + 6]) for n in range(4, 40, 4)]
    rows = [Row(kind="completion", prompt=text, completion=" " + models.words(120)[n]) for n, text in enumerate(words)]
    seen: list[tuple[int, int]] = []
    forward = LlamaForCausalLM.forward

    def watched(self: Any, *args: Any, **given: Any) -> Any:
        found = forward(self, *args, **given)
        seen.append((given["input_ids"].shape[1], found.logits.shape[1]))
        return found

    monkeypatch.setattr(LlamaForCausalLM, "forward", functools.wraps(forward)(watched))
    found = compare_merged(model, lora(model), rows)
    assert found["transformers"].ok and "100 % of the most likely tokens are equal" in found["transformers"].notes[0]
    assert len(seen) == 3 * SERVED_ROWS, "bare, with the adapter and merged"
    assert all(1 < read <= 3 < length for length, read in seen), seen


def test_what_cannot_be_merged_or_computed_is_told(base: Base, lora: Base, tmp_path: Path) -> None:
    model = base("llama")
    found = compare_merged(model, lora(model, lora_bias=True))
    assert found["peft"].ok and "cannot be merged" in found["transformers"].problems[0]
    assert not found["transformers"].ran, "it computes nothing else: it is not there to be served"
    assert "missing" in compare_merged(model, changed(lora(model), tmp_path / "a", {"r": 4}))["peft"].problems[0] or (
        "size mismatch" in compare_merged(model, tmp_path / "a")["peft"].problems[0]
    )
    tensors = {n: t * float("inf") for n, t in load_file(lora(model) / WEIGHTS).items()}
    assert "not finite" in compare_merged(model, changed(lora(model), tmp_path / "b", {}, tensors))["peft"].problems[0]


def test_a_model_that_computes_otherwise_when_merged(base: Base, lora: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that scales what its modules write by hooks on them, which LoRA's part of the output goes around."""

    def scaled(*args: Any, **settings: Any) -> Any:
        model = load_model(*args, **settings)
        for layer in model.model.layers:
            layer.mlp.down_proj.register_forward_hook(lambda _m, _i, output: output * 0.5)
        return model

    release_models()
    monkeypatch.setattr("lorasuite.bases._cache.load_model", scaled)
    model = base("llama")
    found = compare_merged(model, lora(model))["transformers"]
    assert found.ran and not found.ok and "differ by more than" in found.problems[0]


def test_llama_cpp_has_a_name_for_every_module(base: Base) -> None:
    """Against llama.cpp's own table of names, where its package is installed."""
    gguf = pytest.importorskip("gguf", reason="gguf, of the dev extra, is not installed")
    from lorasuite.bases import Checkpoint

    kinds = {
        "llama": "LLAMA", "qwen2": "QWEN2", "gpt_neox": "GPTNEOX", "bloom": "BLOOM", "phi": "PHI2", "phi3": "PHI3",
        "gemma2": "GEMMA2", "gemma3_text": "GEMMA3", "olmo2": "OLMO2", "smollm3": "SMOLLM3", "stablelm": "STABLELM",
        "granite": "GRANITE", "cohere": "COMMAND_R", "qwen3": "QWEN3", "mixtral": "LLAMA", "gpt2": "GPT2",
    }  # fmt: skip
    for family, kind in kinds.items():
        checkpoint = Checkpoint(base(family))
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind], checkpoint.dims.layers)
        for module in checkpoint.modules(0):
            path = checkpoint.architecture.path(0, module)
            if family == "bloom":  # its converter drops the prefix
                path = path.removeprefix("transformer.")
            assert names.get_name(path), f"{family}: {path}"


def test_the_page_tells_the_classes() -> None:
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    for name in VLLM_ARCHITECTURES | LLAMA_CPP_ARCHITECTURES:
        assert f"`{name}`" in page
