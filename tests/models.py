"""Tiny random base models of every family, a word tokenizer, and PEFT adapters, for tests only.

Weights are seeded and well scaled (standard deviation 0.2), so that no comparison passes because everything is near
zero; the vocabulary is larger than the hidden size, so that embeddings have full column rank.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import CONFIG_MAPPING, AutoConfig, BloomConfig, GPT2Config, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from lorasuite.bases import auto_class
from tests.minicpm.configuration_minicpm import MiniCPMConfig
from tests.minicpm.modeling_minicpm import MiniCPMForCausalLM

#: Every model type of the architecture files, each with a fixture.
FAMILIES = (
    "llama", "qwen2", "gpt_neox", "bloom", "mistral", "ministral", "ministral3", "mistral3", "mixtral", "qwen3",
    "qwen3_moe", "qwen2_moe", "llama4_text", "llama4", "phi", "phi3", "gemma", "gemma2", "gemma3_text", "gemma3",
    "olmo", "olmo2", "olmo3", "smollm3", "stablelm", "granite", "cohere", "cohere2", "minicpm", "gpt2", "opt",
    "lfm2", "lfm2_moe", "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_vl",
    "gpt_oss", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "deepseek_v2", "deepseek_v3", "gemma3n_text", "gemma4",
    "gemma4_text", "granitemoehybrid", "falcon_h1", "ernie4_5", "ernie4_5_moe", "exaone4",
    "exaone_moe", "hunyuan_v1_dense", "hunyuan_v1_moe", "seed_oss", "olmoe",
    "gemma4_unified", "gemma4_unified_text",
)  # fmt: skip
#: Families that the table of adapter kinds has a column for. What the others add are names and roles, which kinds of
#: adapters have nothing to do with.
CROSSED = tuple(family for n, family in enumerate(FAMILIES) if n <= FAMILIES.index("lfm2") or family == "qwen3_next")
MULTIMODAL = (
    "llama4", "gemma3", "mistral3", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "gemma4", "gemma4_unified",
)  # fmt: skip
#: Families of latent attention, whose projections are roles of their own.
LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
FUSED = ("gpt_neox", "bloom", "phi3", "gpt2", "glm", "glm4", "granitemoehybrid")
#: Families of which only some layers have attention, and how the kinds of layer alternate.
HYBRID: dict[str, tuple[str, ...]] = {
    "lfm2": ("conv", "full_attention"),
    "lfm2_moe": ("conv", "full_attention"),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe"), ("linear_attention", "full_attention")),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), ("linear_attention", "full_attention")),
    "granitemoehybrid": ("mamba", "attention"),
}

LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GEMMA4 = [*LLAMA_TARGETS, "per_layer_input_gate", "per_layer_projection"]
LAUREL = ["linear_left", "linear_right"]
QWEN3_5 = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]
NEOX_TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
#: Every linear module of a block, by PEFT target name (or pattern, where a vision tower has the same names).
ALL_TARGETS: dict[str, list[str] | str] = {
    **dict.fromkeys(FAMILIES, LLAMA_TARGETS),
    **dict.fromkeys(
        ("gemma3", "mistral3", "qwen3_vl", "gemma4_unified"), r"model\.language_model\..*(q|k|v|o|gate|up|down)_proj"
    ),
    "gemma4": rf"model\.language_model\.layers\..*({'|'.join(GEMMA4)})",
    "gemma4_text": GEMMA4,
    "gemma3n_text": [*GEMMA4, *LAUREL],
    "gpt_neox": NEOX_TARGETS,
    "bloom": NEOX_TARGETS,
    **dict.fromkeys(
        ("mixtral", "qwen3_moe", "gpt_oss", "glm4_moe", "ernie4_5_moe", "exaone_moe", "hunyuan_v1_moe", "olmoe"),
        LLAMA_TARGETS[:4],
    ),
    **{key: ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"] for key in LATENT},
    **{key: [*LLAMA_TARGETS[:4], "gate_up_proj", "down_proj"] for key in ("glm", "glm4")},
    **{key: [*LLAMA_TARGETS, *QWEN3_5] for key in ("qwen3_5", "qwen3_5_text")},
    **{
        key: [*LLAMA_TARGETS[:4], *QWEN3_5, *(f"shared_expert.{n}" for n in LLAMA_TARGETS[4:])]
        for key in ("qwen3_5_moe", "qwen3_5_moe_text")
    },
    "granitemoehybrid": [*LLAMA_TARGETS[:4], "in_proj", "out_proj", "input_linear", "output_linear"],
    "falcon_h1": [*LLAMA_TARGETS, "in_proj"],
    "lfm2_moe": ["q_proj", "k_proj", "v_proj", "in_proj", "out_proj", "w1", "w2", "w3"],
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "lfm2": ["q_proj", "k_proj", "v_proj", "in_proj", "out_proj", "w1", "w2", "w3"],
    "qwen3_next": [*LLAMA_TARGETS[:4], "in_proj_qkvz", "in_proj_ba", "out_proj"],
}

EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}
ROUTED: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
GROUPED: dict[str, Any] = {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LINEAR: dict[str, Any] = {
    "head_dim": 12, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
}  # fmt: skip
MLA: dict[str, Any] = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 7}
STATE: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_state": 5, "mamba_n_groups": 1, "mamba_chunk_size": 4}
#: What a family's fixture has beside the common numbers: what sets the family apart.
PECULIAR: dict[str, dict[str, Any]] = {
    "ministral": {"head_dim": 8},
    "mistral": {"head_dim": 12},
    "mixtral": EXPERTS,
    "olmoe": {"num_experts": 2, "num_experts_per_tok": 1},
    "qwen3": {"head_dim": 12},
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 8, "mlp_only_layers": [1], "head_dim": 12},
    "qwen2_moe": {
        **EXPERTS, "num_experts": 2, "moe_intermediate_size": 8, "mlp_only_layers": [1],
        "shared_expert_intermediate_size": 20,
    },
    "llama4_text": {**EXPERTS, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 40, "head_dim": 8},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "minicpm": {"scale_emb": 12, "scale_depth": 1.4},
    "qwen3_vl_text": {"head_dim": 12},
    "lfm2": {"block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**ROUTED, "num_dense_layers": 1},
    "qwen3_next": {**ROUTED, **LINEAR, "mlp_only_layers": [1], "shared_expert_intermediate_size": 20},
    **dict.fromkeys(("qwen3_5", "qwen3_5_text"), LINEAR),
    **{key: {**LINEAR, **ROUTED} for key in ("qwen3_5_moe", "qwen3_5_moe_text")},
    **{key: {"head_dim": 12} for key in ("seed_oss", "ernie4_5")},
    "gpt_oss": {**EXPERTS, "head_dim": 12},
    **{key: {"head_dim": 8} for key in ("glm", "glm4", "hunyuan_v1_dense")},
    "glm4_moe": {**ROUTED, **GROUPED, "head_dim": 12},
    "exaone_moe": {**ROUTED, **GROUPED, "num_shared_experts": 1, "head_dim": 12},
    "deepseek_v2": {**ROUTED, **GROUPED, **MLA, "q_lora_rank": None},
    **{key: {**ROUTED, **GROUPED, **MLA, "q_lora_rank": 10} for key in ("deepseek_v3", "glm4_moe_lite")},
    "gemma3n_text": {
        "head_dim": 16, "laurel_rank": 4, "altup_num_inputs": 2, "hidden_size_per_layer_input": 6,
        "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 96, "activation_sparsity_pattern": None,
    },
    "gemma4_text": {
        "head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 96,
    },
    "gemma4_unified_text": {"head_dim": 16, "global_head_dim": 16},
    "ernie4_5_moe": {"moe_num_experts": 2, "moe_k": 1, "moe_intermediate_size": 8, "moe_num_shared_experts": 1},
    "hunyuan_v1_moe": {"num_experts": 2, "moe_topk": 1, "head_dim": 8},
    "granitemoehybrid": {**EXPERTS, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, **STATE},
    "falcon_h1": {"embedding_multiplier": 2.0, "key_multiplier": 0.5, **STATE},
}  # fmt: skip
NO_KV_HEADS = ("gpt_neox", "bloom", "gpt2", "opt")
QWEN_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "patch_size": 14, "out_hidden_size": 32,
    "num_position_embeddings": 4, "deepstack_visual_indexes": [0],
}  # fmt: skip
VISION: dict[str, dict[str, Any]] = {
    "gemma3": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
               "image_size": 28, "patch_size": 14},
    "mistral3": {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                 "num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14},
    "llama4": {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
               "image_size": 28, "patch_size": 14, "projector_input_dim": 16, "projector_output_dim": 16,
               "vision_output_dim": 16},
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_vl"), QWEN_VISION),
    "gemma4": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
               "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4},
    "gemma4_unified": {"patch_size": 4, "pooling_kernel_size": 1, "mm_embed_dim": 32, "mm_posemb_size": 4,
                       "output_proj_dims": 32},
}  # fmt: skip
#: Type of the language model inside a multimodal one.
INNER = {**{family: f"{family}_text" for family in VISION}, "mistral3": "mistral"}

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
    **extra: Any,
) -> Any:
    """A transformers config of the family. Bloom's MLP is always 4 × hidden, whatever ``intermediate`` says."""
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if family in VISION:
        text = config_for(
            INNER[family], vocab=vocab, hidden=hidden, intermediate=intermediate, layers=layers, heads=heads,
            kv_heads=kv_heads, head_dim=head_dim, **extra,
        )  # fmt: skip
        own = () if family in HYBRID or family.startswith("gemma") else ("layer_types",)
        nested = {key: value for key, value in text.to_dict().items() if key not in own}
        more = {"mm_tokens_per_image": 1} if family == "gemma3" else {}
        return CONFIG_MAPPING[family](text_config=nested, vision_config=VISION[family], **more)
    if family == "bloom":
        return BloomConfig(vocab_size=vocab, hidden_size=hidden, n_layer=layers, n_head=heads, **ids, **extra)
    if family == "gpt2":
        return GPT2Config(
            vocab_size=vocab, n_embd=hidden, n_layer=layers, n_head=heads, n_inner=intermediate, n_positions=128,
            **ids, **extra,
        )  # fmt: skip
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 128,
        **ids,
        **PECULIAR.get(family, {}),
        **({"layer_types": [HYBRID[family][n % 2] for n in range(layers)]} if family in HYBRID else {}),
        **extra,
    }
    if family == "opt":
        common["ffn_dim"] = common.pop("intermediate_size")
        common.setdefault("word_embed_proj_dim", hidden)
    if family not in NO_KV_HEADS:
        common["num_key_value_heads"] = heads if family in LATENT else kv_heads or heads
    if family.startswith("qwen3_5_moe"):
        common["shared_expert_intermediate_size"] = common.pop("intermediate_size")
    if family == "granitemoehybrid":
        common |= {"shared_intermediate_size": intermediate, "intermediate_size": 8, "mamba_d_head": hidden // 2}
    if family == "falcon_h1":
        common |= {"mamba_d_ssm": 2 * hidden, "mamba_d_head": hidden // 2}
    if family.startswith(("gemma3n", "gemma4")):
        common["layer_types"] = [("full_attention", "sliding_attention")[n % 2] for n in range(layers)]
    if head_dim is not None and family not in LATENT:
        common["head_dim"] = head_dim
    if family in ("ministral3", "cohere2") and head_dim is None:
        common["head_dim"] = hidden // heads
    if family == "minicpm":
        return MiniCPMConfig(**common)
    return CONFIG_MAPPING[family](**common)


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
    if family == "minicpm":  # its code goes beside its weights
        MiniCPMConfig.register_for_auto_class()
        MiniCPMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
        model: Any = MiniCPMForCausalLM(config)
    else:
        model = auto_class(config).from_config(config)
    randomise(model, seed)
    model.to(dtype).save_pretrained(path, max_shard_size=shard or "1GB")
    build_tokenizer(path, tokens if tokens is not None else words(config.get_text_config().vocab_size))
    return path


def load(path: Path) -> Any:
    """The transformers model, float32, evaluation mode: a copy of the one read first, which takes a third of the time.

    Experts are computed one after the other: the grouped kernel knows no float64.
    """
    files = [*path.glob("*.safetensors"), path / "config.json"]
    return copy.deepcopy(_loaded(path, tuple(sorted(file.stat().st_mtime_ns for file in files))))


@lru_cache(maxsize=64)
def _loaded(path: Path, _changed: tuple[int, ...]) -> Any:
    trust = needs_code(path)
    config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust)
    config.get_text_config()._experts_implementation = "eager"
    loader = auto_class(config)
    return loader.from_pretrained(str(path), config=config, dtype=torch.float32, trust_remote_code=trust).eval()


def needs_code(path: Path) -> bool:
    """Whether a model directory brings its own code."""
    return "auto_map" in json.loads((path / "config.json").read_text())


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
        tuned.create_or_update_model_card = lambda _folder: None  # a template compiled at each save
        tuned.save_pretrained(path)
    return path


def load_tuned(adapter: Path, model: Path) -> PeftModel:
    """The adapter on its base, through ``PeftModel.from_pretrained``."""
    return PeftModel.from_pretrained(load(model), str(adapter))


def peft_deltas(adapter: Path, model: Path) -> dict[str, torch.Tensor]:
    """Module path → ΔW, as PEFT itself computes it (``get_delta_weight``), float64."""
    tuned = load_tuned(adapter, model)
    return {
        name.removeprefix("base_model.model."): out_in(module, module.get_delta_weight("default")).detach().double()
        for name, module in tuned.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", {})
    }


def out_in(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """A module's weight as ``(out, in)``: transformers' ``Conv1D`` stores the transpose."""
    return weight.T if isinstance(getattr(module, "base_layer", module), Conv1D) else weight


def edit_json(path: Path, **changes: Any) -> None:
    """Overwrite fields of a JSON file."""
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps(value))
