"""Tiny random base models of every family, a word tokenizer, and PEFT adapters, for tests only.

Weights are seeded and well scaled (standard deviation 0.2), so that no comparison passes because everything is near
zero; the vocabulary is larger than the hidden size, so that embeddings have full column rank.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

FAMILIES = ("llama", "qwen2", "gpt_neox", "bloom")

#: Every linear module of a block, by PEFT target name.
ALL_TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")


def words(size: int) -> list[str]:
    """``size`` token strings: the special ones, then ``w0 w1 …``."""
    return [*SPECIAL, *(f"w{n}" for n in range(size - len(SPECIAL)))]


def build_tokenizer(path: Path, tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """A whitespace tokenizer whose ids are the positions in ``tokens``, saved in ``path``."""
    raw = Tokenizer(WordLevel({token: n for n, token in enumerate(tokens)}, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(path)
    return tokenizer


def tokenizer_of(path: Path) -> PreTrainedTokenizerFast:
    """The saved tokenizer as it is. ``AutoTokenizer`` gives every Qwen2 directory byte-level BPE, whatever it holds."""
    return PreTrainedTokenizerFast.from_pretrained(str(path))


def config_for(
    family: str,
    *,
    vocab: int = 96,
    hidden: int = 32,
    intermediate: int = 48,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int | None = None,
    head_dim: int | None = None,
) -> Any:
    """A transformers config of the family. Bloom's MLP is always 4 × hidden, whatever ``intermediate`` says."""
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if family == "bloom":
        return BloomConfig(vocab_size=vocab, hidden_size=hidden, n_layer=layers, n_head=heads, **ids)
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 128,
        **ids,
    }
    if family == "gpt_neox":
        return GPTNeoXConfig(**common)
    common["num_key_value_heads"] = kv_heads or heads
    if head_dim is not None:
        common["head_dim"] = head_dim
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[family](**common)


def randomise(model: torch.nn.Module, seed: int, std: float = 0.2) -> None:
    """Fill every parameter from ``seed``: weights N(0, std²), biases N(0, 0.1²), norm gains around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * std)
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.1)
            else:
                parameter.copy_(1 + noise * 0.1)


def build(
    path: Path,
    family: str,
    *,
    seed: int = 0,
    shard: str | None = None,
    dtype: torch.dtype = torch.float32,
    tokens: Sequence[str] | None = None,
    **numbers: Any,
) -> Path:
    """A random model and its tokenizer, saved with ``save_pretrained``; ``shard`` is a ``max_shard_size``."""
    config = config_for(family, **numbers)
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, seed)
    model.to(dtype).save_pretrained(path, max_shard_size=shard or "1GB")
    build_tokenizer(path, tokens if tokens is not None else words(config.vocab_size))
    return path


def load(path: Path) -> Any:
    """The transformers model, float32, evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32).eval()


def build_adapter(
    path: Path,
    model: Path,
    *,
    targets: Sequence[str] | str | None = None,
    rank: int = 3,
    alpha: float = 6,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 1,
    std: float = 0.3,
    **extra: Any,
) -> Path:
    """A random LoRA adapter (``B`` not zero) of a saved model, written by PEFT itself."""
    base = load(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=ALL_TARGETS[base.config.model_type] if targets is None else targets,
        use_rslora=rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        layers_to_transform=None if layers is None else list(layers),
        task_type="CAUSAL_LM",
        **extra,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.save_pretrained(path)
    return path


def load_tuned(adapter: Path, model: Path) -> PeftModel:
    """The adapter on its base, through ``PeftModel.from_pretrained``."""
    return PeftModel.from_pretrained(load(model), str(adapter))


def peft_deltas(adapter: Path, model: Path) -> dict[str, torch.Tensor]:
    """Module path → ΔW, as PEFT itself computes it (``get_delta_weight``), float64."""
    tuned = load_tuned(adapter, model)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double()
        for name, module in tuned.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", {})
    }


def edit_json(path: Path, **changes: Any) -> None:
    """Overwrite fields of a JSON file."""
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps(value))
