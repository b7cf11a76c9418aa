"""Bases with random weights at the shapes of real ones, made on the spot, with what a migration of them needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from lorasuite.adapters import LowRank, write_adapter
from lorasuite.bases import Checkpoint, auto_class

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
#: Families whose tokenizer transformers replaces by its own, and the one with the same modules that takes their place.
STANDS_FOR = {"qwen2": "llama"}
#: Published configurations of the shapes of 8B and 70B, beside those of the nine pairs (``tests/real_pairs.yaml``).
LARGE: dict[str, dict[str, Any]] = {
    "llama-3-8b": {"layers": 32, "hidden": 4096, "inner": 14336, "heads": 32, "kv": 8, "words": 128256},
    "qwen-3-8b": {"layers": 36, "hidden": 4096, "inner": 12288, "heads": 32, "kv": 8, "words": 151936},
    "llama-2-70b": {"layers": 80, "hidden": 8192, "inner": 28672, "heads": 64, "kv": 8, "words": 32000},
    "llama-3-70b": {"layers": 80, "hidden": 8192, "inner": 28672, "heads": 64, "kv": 8, "words": 128256},
}
TABLE = yaml.safe_load((Path(__file__).parents[1] / "tests" / "real_pairs.yaml").read_text())
#: The nine pairs of the paper, then 8B and 70B: old and new model by name.
PAIRS: list[tuple[str, str]] = [
    *((pair["old"], pair["new"]) for pair in TABLE["pairs"]),
    ("llama-3-8b", "qwen-3-8b"),
    ("llama-2-70b", "llama-3-70b"),
]


def llama(layers: int, hidden: int, inner: int, heads: int, kv: int, words: int, tied: bool = False) -> dict[str, Any]:
    """A Llama configuration."""
    return {
        "model_type": "llama", "vocab_size": words, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "max_position_embeddings": 4096, "tie_word_embeddings": tied,
    }  # fmt: skip


def published(name: str) -> dict[str, Any]:
    """The configuration of a model of :data:`PAIRS`."""
    return dict(TABLE["models"][name]["config"]) if name in TABLE["models"] else llama(**LARGE[name])


def cut(config: Mapping[str, Any], layers: int, words: int) -> dict[str, Any]:
    """The same widths, so many layers deep, with so many words."""
    depth = "n_layer" if "n_layer" in config else "num_hidden_layers"
    return {**config, depth: layers, "vocab_size": words}


def write_base(
    path: Path, config: Mapping[str, Any], seed: int, device: str = "cpu", dtype: Any = torch.bfloat16
) -> Path:
    """A base with weights N(0, 0.02²) and a tokenizer of whole words ``w0 w1 …``, saved."""
    family = STANDS_FOR.get(config["model_type"], config["model_type"])
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    numbers = {name: value for name, value in config.items() if name != "model_type"}
    made = CONFIG_MAPPING[family](**{**numbers, **ids})
    with torch.device("meta"):
        model = auto_class(made).from_config(made, dtype=dtype)
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator) if parameter.ndim > 1 else parameter.fill_(1)
    model.tie_weights()
    model.save_pretrained(path, max_shard_size="2GB")
    words = [*SPECIAL, *(f"w{n}" for n in range(made.vocab_size - len(SPECIAL)))]
    raw = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    return path


def write_lora(path: Path, base: Path, rank: int) -> Path:
    """A random LoRA of every linear module of a base."""
    checkpoint = Checkpoint(base)
    generator = torch.Generator().manual_seed(5)
    updates = {}
    for layer in range(checkpoint.dims.layers):
        for module in checkpoint.modules(layer):
            rows = sum(checkpoint.dims.rows(role) for role in module.roles)
            left, right = (
                torch.randn(shape, generator=generator, dtype=torch.float64) * 0.02
                for shape in ((rows, rank), (rank, checkpoint.dims.columns(module.roles[0])))
            )
            updates[checkpoint.architecture.path(layer, module)] = LowRank(left, right)
    return write_adapter(
        path, updates, architecture=checkpoint.architecture, dims=checkpoint.dims, base=str(base), rank=rank, alpha=rank
    )


def write_data(folder: Path, words: int, texts: int, rows: int, tokens: int, labels: int = 8) -> tuple[Path, Path]:
    """Calibration texts and training rows of so many words each, of which the rows' last are the answer."""

    def line(seed: int, count: int) -> str:
        drawn = torch.randint(words - len(SPECIAL), (count,), generator=torch.Generator().manual_seed(seed))
        return " ".join(f"w{n}" for n in drawn.tolist())

    calibration, train = folder / "texts.jsonl", folder / "rows.jsonl"
    calibration.write_text("".join(json.dumps({"text": line(n, tokens - 2)}) + "\n" for n in range(texts)))
    train.write_text(
        "".join(
            json.dumps({"prompt": line(1000 + n, tokens - labels), "completion": " " + line(5000 + n, labels - 2)})
            + "\n"
            for n in range(rows)
        )
    )
    return calibration, train
