"""Whether the programs that serve models take an adapter, and compute the same with it.

PEFT and plain transformers are run themselves, on rows of the evaluation (:func:`compare_merged`); ``_llama_cpp.py``
runs llama.cpp. vLLM's and llama.cpp's rules are written down here (:func:`check`), for neither needs to be installed to
read them; ``docs/serving.md`` names the file and revision each rule was read from. A rule that makes a loader refuse
the adapter, or compute something else with it, is a *problem*; what an operator has to set is a *note*.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasuite.adapters import CONFIG, PREFIX, WEIGHTS, Tensors
from lorasuite.bases import LoadSettings, load_tokenizer, loaded_model, read_json
from lorasuite.data import IGNORED, Row, encode
from lorasuite.errors import AdapterError
from lorasuite.evaluation._served import SAME, Served

if TYPE_CHECKING:
    from torch import Tensor

#: Model classes (``architectures`` of ``config.json``) that vLLM supports LoRA for; of the families of lorasuite.
VLLM_ARCHITECTURES = frozenset(
    {
        "Cohere2ForCausalLM", "CohereForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM",
        "Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM", "Exaone4ForCausalLM", "FalconH1ForCausalLM",
        "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration", "GemmaForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM",
        "Glm4MoeLiteForCausalLM", "GlmForCausalLM", "GptOssForCausalLM", "GraniteForCausalLM",
        "GraniteMoeHybridForCausalLM", "HunYuanDenseV1ForCausalLM", "HunYuanMoEV1ForCausalLM", "Lfm2ForCausalLM",
        "Lfm2MoeForCausalLM", "Llama4ForConditionalGeneration", "LlamaForCausalLM", "MiniCPMForCausalLM",
        "Mistral3ForConditionalGeneration", "MistralForCausalLM", "MixtralForCausalLM", "OPTForCausalLM",
        "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoForCausalLM", "OlmoeForCausalLM", "Phi3ForCausalLM",
        "PhiForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM", "Qwen3VLForConditionalGeneration", "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
        "SeedOssForCausalLM", "SmolLM3ForCausalLM",
    }
)  # fmt: skip
#: What ``--max-lora-rank`` may be; 16 if it is not given.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16

#: Model classes that llama.cpp converts; of the families of lorasuite.
LLAMA_CPP_ARCHITECTURES = frozenset(
    {
        "BloomForCausalLM", "Cohere2ForCausalLM", "CohereForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM",
        "Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM", "Exaone4ForCausalLM", "FalconH1ForCausalLM",
        "GPT2LMHeadModel", "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration", "Gemma3nForCausalLM", "Gemma3nForConditionalGeneration",
        "Gemma4ForConditionalGeneration", "GemmaForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM",
        "Glm4MoeLiteForCausalLM", "GlmForCausalLM", "GptOssForCausalLM", "GraniteForCausalLM",
        "GraniteMoeHybridForCausalLM", "HunYuanDenseV1ForCausalLM", "HunYuanMoEV1ForCausalLM", "Lfm2ForCausalLM",
        "Lfm2MoeForCausalLM", "Llama4ForCausalLM", "Llama4ForConditionalGeneration", "LlamaForCausalLM",
        "MiniCPMForCausalLM", "Ministral3ForCausalLM", "Mistral3ForConditionalGeneration", "MistralForCausalLM",
        "MixtralForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoForCausalLM", "OlmoeForCausalLM",
        "Phi3ForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "Qwen3VLForConditionalGeneration", "Qwen3_5ForCausalLM",
        "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration",
        "SeedOssForCausalLM", "SmolLM3ForCausalLM", "StableLmForCausalLM",
    }
)  # fmt: skip

#: Of adapters with ``target_parameters``, by either: their names and shapes are those of PEFT alone.
STACKED = "updates of experts, stacked as PEFT adapts parameters, are not known to be taken: merge the adapter"

FACTORS = (".lora_A.weight", ".lora_B.weight")
EMBEDDING_FACTORS = (".lora_embedding_A", ".lora_embedding_B")

#: What :func:`compare_merged` lets the logits differ by, relative to the largest one: float32, and 16 bits.
TOLERANCE, TOLERANCE_16 = 1e-4, 5e-2
#: An adapter that changes no logit by more, relative to the largest one, answers as the base does.
NO_EFFECT = 1e-5
#: Rows of the evaluation that are compared, and tokens of each and of its answer.
SERVED_ROWS, SERVED_TOKENS, ANSWER_TOKENS = 8, 256, 64
#: What is compared where there are no rows.
TEXT = "The quick brown fox jumps over the lazy dog, and twelve more sentences follow in the same old way."


def check(adapter: Path, base: Path) -> dict[str, Served]:
    """vLLM's and llama.cpp's rules on a PEFT directory: its config, and names and shapes of its tensors.

    Args:
        adapter: the PEFT directory.
        base: directory of the base it is for; only its ``config.json`` is read.

    Returns:
        ``vllm`` and ``llama.cpp``.

    Raises:
        CheckpointError: if either directory cannot be read.
    """
    config, model = read_json(adapter / CONFIG), read_json(base / "config.json")
    shapes = Tensors(adapter / WEIGHTS).shapes
    return {"vllm": _vllm(config, model, shapes), "llama.cpp": _llama_cpp(config, model, shapes)}


Shapes = Mapping[str, tuple[int, ...]]


def _vllm(config: Mapping[str, Any], model: Mapping[str, Any], shapes: Shapes) -> Served:
    problems, notes = _class_of(model, VLLM_ARCHITECTURES, "vLLM has no LoRA support for"), []
    # AdaLoRA's pattern lists which directions are kept
    ranks = [sum(kept) if isinstance(kept, list) else int(kept) for kept in (config.get("rank_pattern") or {}).values()]
    rank = max([int(config["r"]), *ranks])
    if rank > VLLM_RANKS[-1]:
        problems.append(f"rank {rank} is above {VLLM_RANKS[-1]}, the largest --max-lora-rank")
    elif rank > VLLM_DEFAULT_RANK:
        notes.append(f"--max-lora-rank {next(r for r in VLLM_RANKS if r >= rank)} (16 if it is not given)")
    else:
        notes.append(f"rank {rank} fits the default --max-lora-rank of {VLLM_DEFAULT_RANK}")
    problems += [f"{what} is not supported" for key, what in _VLLM_REFUSES.items() if config.get(key)]
    if config.get("peft_type") != "LORA":
        problems.append(f"adapters of type {config.get('peft_type')} are not supported")
    if config.get("bias", "none") != "none":
        problems.append("trained biases (bias is not none) are not supported")
    problems += _foreign(shapes, outside=False) + ([STACKED] if config.get("target_parameters") else [])
    if any(name.endswith(EMBEDDING_FACTORS) for name in shapes):
        notes.append("updates of embeddings are taken only by model classes that list embedding_modules")
    # vLLM scales every module by alpha/r of the config: patterns are not read.
    overall = _scale(config, None, int(config["r"]))
    unlike = [path for path, factor in _scales(config, shapes).items() if not math.isclose(factor, overall)]
    if unlike:
        problems.append(f"{len(unlike)} modules such as {unlike[0]} have another scale than alpha/r of the config")
    return Served(ok=not problems, problems=problems, notes=notes)


_VLLM_REFUSES = {
    "use_dora": "DoRA",
    "modules_to_save": "a fully trained module (modules_to_save)",
    "trainable_token_indices": "training single tokens (trainable_token_indices)",
    "layer_replication": "layer_replication",
}


def _llama_cpp(config: Mapping[str, Any], model: Mapping[str, Any], shapes: Shapes) -> Served:
    problems = _class_of(model, LLAMA_CPP_ARCHITECTURES, "convert_hf_to_gguf.py does not convert")
    problems += _foreign(shapes, outside=True) + ([STACKED] if config.get("target_parameters") else [])
    if config.get("fan_in_fan_out"):
        problems.append("the converter transposes Conv1D weights, and with them the factors of their LoRA")
    if _tied(model) and any(name.startswith((f"{PREFIX}lm_head.", f"{PREFIX}embed_out.")) for name in shapes):
        problems.append("an update of lm_head is refused where it is tied to the input embeddings")
    # llama.cpp scales a module by alpha over the rank of its own B: alpha_pattern and rsLoRA's root are not read.
    alpha = float(config["lora_alpha"])
    unlike = [
        path
        for path, factor in _scales(config, shapes).items()
        if not math.isclose(factor, alpha / _rank(shapes, path), rel_tol=1e-6)
    ]
    if unlike:
        why = "rsLoRA's alpha/√r is not read" if config.get("use_rslora") else "alpha_pattern is not read"
        problems.append(f"{len(unlike)} modules such as {unlike[0]} would be scaled otherwise: {why}")
    return Served(
        ok=not problems,
        problems=problems,
        notes=["python convert_lora_to_gguf.py --base BASE THIS_DIRECTORY"] if not problems else [],
    )


def _class_of(model: Mapping[str, Any], known: frozenset[str], what: str) -> list[str]:
    named = model.get("architectures") or ["(none named)"]
    return [] if named[0] in known else [f"{what} {named[0]}"]


def _foreign(shapes: Shapes, outside: bool) -> list[str]:
    """Tensors that are no factor of a LoRA, by either loader's naming; and factors without their partner.

    Args:
        outside: whether copies of the base's weights (``base_layer``) are passed over silently.
    """
    problems = []
    known = (*FACTORS, *EMBEDDING_FACTORS)
    odd = [name for name in shapes if not name.endswith(known) and not (outside and ".base_layer.weight" in name)]
    if odd:
        problems.append(f"{len(odd)} tensors such as {odd[0]} are no LoRA factors")
    prefixless = [name for name in shapes if not name.startswith(PREFIX)]
    if prefixless:
        problems.append(f"{len(prefixless)} tensors such as {prefixless[0]} do not begin with {PREFIX}")
    for a, b in (FACTORS, EMBEDDING_FACTORS):
        ends = {name.removesuffix(a) for name in shapes if name.endswith(a)}
        ends ^= {name.removesuffix(b) for name in shapes if name.endswith(b)}
        if ends:
            problems.append(f"{len(ends)} modules such as {min(ends)} have one factor of two")
    return problems


def _tied(model: Mapping[str, Any]) -> bool:
    text = model.get("text_config") or {}
    return bool(text.get("tie_word_embeddings", model.get("tie_word_embeddings", False)))


def _rank(shapes: Shapes, path: str) -> int:
    return shapes[f"{PREFIX}{path}{FACTORS[1]}"][1]


def _scales(config: Mapping[str, Any], shapes: Shapes) -> dict[str, float]:
    """What PEFT multiplies each module's ``B·A`` by."""
    paths = [
        name.removeprefix(PREFIX).removesuffix(FACTORS[1])
        for name in shapes
        if name.startswith(PREFIX) and name.endswith(FACTORS[1])
    ]
    return {path: _scale(config, path, _rank(shapes, path)) for path in paths}


def _scale(config: Mapping[str, Any], path: str | None, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = float(config["lora_alpha"])
    if path is not None and patterns:
        alpha = float(patterns.get(get_pattern_key(patterns.keys(), path), alpha))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def compare_merged(
    base: Path,
    adapter: Path,
    rows: Sequence[Row] = (),
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    loading: LoadSettings | None = None,
) -> dict[str, Served]:
    """Load base and adapter in PEFT, merge them, and compare the logits that answers of some rows are read from.

    Merged, the model must be a plain one again: its class and the names of its weights are the base's. What PEFT
    refuses, or cannot merge, is returned as a problem and not raised: the adapter may still be of use elsewhere.

    Args:
        base: a model directory.
        adapter: the PEFT directory.
        rows: held-out rows, of which the first :data:`SERVED_ROWS` are read; where there are none, :data:`TEXT` is.
        device: ``cpu`` or ``cuda``.
        trust_remote_code: whether code of the base's own may run.
        loading: how the base is loaded, by default as its files give it.

    Returns:
        ``peft`` and ``transformers``.

    Raises:
        CheckpointError: if the base cannot be loaded.
        DataError: if no answer fits into :data:`SERVED_TOKENS` tokens.
    """
    tokenizer = load_tokenizer(base, trust_remote_code)
    # not kept: merging changes the weights
    asked = loading or LoadSettings()
    with loaded_model(base, device, trust_remote_code=trust_remote_code, keep=False, loading=asked) as model:
        return _compared(model, compared_texts(rows, tokenizer, model), adapter, device)


def compared_texts(rows: Sequence[Row], tokenizer: Any, model: Any) -> list[tuple[list[int], int]]:
    """Token ids of each text that is compared, and from how many positions at its end logits are read."""
    if not rows:
        tokens = tokenizer(TEXT)["input_ids"][:ANSWER_TOKENS]
        if len(tokens) < 2:  # a tokenizer that knows none of these words
            tokens = list(range(1, min(17, model.get_input_embeddings().num_embeddings)))
        return [(tokens, len(tokens))]
    found = []
    for example in encode(rows[:SERVED_ROWS], tokenizer, SERVED_TOKENS):
        ids, labels = example["input_ids"], example["labels"]
        first = next(at for at, label in enumerate(labels) if label != IGNORED)
        ids = ids[: first + ANSWER_TOKENS]
        found.append((ids, len(ids) - first + 1))  # a token is predicted from the position before it
    return found


def _compared(model: Any, texts: list[tuple[list[int], int]], adapter: Path, device: str) -> dict[str, Served]:
    """What :func:`compare_merged` says of a loaded base, whose weights are merged with the adapter's."""
    import torch

    from lorasuite.adapters import attach_adapter

    names, kind = set(model.state_dict()), type(model)
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(wrapped: Any) -> list[Tensor]:
        found = []
        with torch.inference_mode():
            for ids, last in texts:
                kept = {"logits_to_keep": last} if keeps else {}
                out = wrapped(input_ids=torch.tensor([ids], device=device), use_cache=False, **kept).logits
                found.append(out[0, -last:].float())
        return found

    bare = logits(model)
    try:
        wrapped = attach_adapter(model, adapter, device=device)
    except AdapterError as error:
        return dict.fromkeys(("peft", "transformers"), _refused(str(error), ran=True))
    adapted = logits(wrapped)
    if not all(bool(torch.isfinite(one).all()) for one in adapted):
        return dict.fromkeys(("peft", "transformers"), _refused("its logits are not finite", ran=True))
    scale = max(float(one.abs().max()) for one in adapted)
    effect = _farthest(bare, adapted) / scale
    in_peft = _told([] if effect > NO_EFFECT else [SAME], f"it changes logits by up to {_share(effect)}")
    try:
        merged = wrapped.merge_and_unload()
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        return {"peft": in_peft, "transformers": _refused(f"it cannot be merged ({error})")}
    again = logits(merged)
    difference = _farthest(again, adapted) / scale
    limit = TOLERANCE if next(merged.parameters()).dtype == torch.float32 else TOLERANCE_16
    problems = []
    if type(merged) is not kind or set(merged.state_dict()) != names:
        problems.append("the merged model is not a plain one: names of its weights differ from the base's")
    if not difference <= limit:
        problems.append(f"merged logits differ by more than {_share(limit)}")
    if not _farthest(bare, again) / scale > NO_EFFECT:
        problems.append(SAME)
    pairs = [(one.argmax(-1), other.argmax(-1)) for one, other in zip(again, adapted, strict=True)]
    same = sum(int((one == other).sum()) for one, other in pairs) / sum(len(one) for one, _ in pairs)
    note = f"merged logits differ by up to {_share(difference)}, {100 * same:.0f} % of the most likely tokens are equal"
    return {"peft": in_peft, "transformers": _told(problems, note)}


def _farthest(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest difference of two logits."""
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def _share(value: float) -> str:
    return f"{value:.1e} of the largest"


def _told(problems: list[str], note: str) -> Served:
    return Served(ok=not problems, problems=problems, notes=[note], ran=True)


def _refused(why: str, ran: bool = False) -> Served:
    return Served(ok=False, problems=[why], ran=ran)
