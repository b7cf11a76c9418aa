"""A base's config, held against what transformers can make a model of: what passes here runs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from lorasuite.bases import Checkpoint, empty_model
from lorasuite.errors import Problem, did_you_mean

#: Fields of a config that are used behind any check of transformers, and what they must be.
_FORMS: dict[str, tuple[tuple[type, ...], str]] = {
    "architectures": ((list,), "a list"),
    "attn_implementation": ((str, dict), "a text"),
    "text_config": ((dict,), "settings by name"),
    "sliding_window": ((int, float, list), "a number"),
}
#: Numbers that models divide by, take a root of or make masks of: they must be above zero.
_POSITIVE = re.compile(
    r"num_key_value_heads|moe_intermediate_size|factor|sliding_window|query_pre_attn_scalar|logits_scaling"
    r"|attention_multiplier|rope_theta|n_group|partial_rotary_factor|rotary_pct|decoder_sparse_step"
    r"|.*(chunk_size|n_groups|soft_?cap(ping)?)"
)
#: Numbers that must not be below zero.
_NOT_NEGATIVE = re.compile(r"num_experts_per_tok|topk_group|.*(eps|epsilon|initializer_range|dropout|pdrop)")
#: Shares of a whole.
_AT_MOST_ONE = re.compile(r"partial_rotary_factor|rotary_pct|.*(dropout|pdrop)")
#: What activations are multiplied by, and how much at most for float32 to hold them.
_SCALE, _LARGEST = re.compile(r".*multipliers?"), 1e6
_OTHER = "The config does not belong to these weights."
#: Ranges whose upper end families have infinite.
_ENDLESS = ("time_step_limit",)


def unusable_config(checkpoint: Checkpoint, sound: bool = True) -> list[Problem]:
    """Why transformers could make no model of a base's config: values it refuses, an unknown activation,
    sizes that are not those of the weights.

    Args:
        sound: whether the checkpoint has what its architecture file expects.
    """
    from transformers import CONFIG_MAPPING
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind, where = str(checkpoint.config.get("model_type")), str(checkpoint.path / "config.json")
    if kind not in CONFIG_MAPPING:
        return []
    wrong = [
        Problem(f"{where}: {name}", f"is {value!r:.100}, and must be {told}", "Mend the config.")
        for name, (kinds, told) in _FORMS.items()
        if (value := checkpoint.config.get(name)) is not None and not isinstance(value, kinds)
    ]
    wrong += _numbers(checkpoint.config, where)
    if wrong:
        return wrong
    try:
        text = CONFIG_MAPPING[kind].from_pretrained(str(checkpoint.path)).get_text_config()
        values = text.to_dict()
    except Exception as error:  # each family's class checks in its own way
        return [Problem(where, f"is refused by transformers ({type(error).__name__}: {error})", "Mend the config.")]
    if values.get("head_dim") == 0:
        return [Problem(f"{where}: head_dim", "is 0", "Mend the config.")]
    rope = values.get("rope_parameters")
    turned = rope.get("rope_type") if isinstance(rope, Mapping) else None
    if isinstance(turned, str) and turned not in {"default", "mrope", *ROPE_INIT_FUNCTIONS}:
        what = f"rope_type {turned!r} is none that transformers has"
        return [Problem(f"{where}: rope_parameters", what, did_you_mean(turned, sorted(ROPE_INIT_FUNCTIONS)))]
    named = {name: getattr(text, name, None) for name in ("hidden_act", "hidden_activation", "activation_function")}
    wrong = [
        Problem(f"{where}: {name}", f"{value!r} is no activation that transformers has", "Mend the config.")
        for name, value in named.items()
        if isinstance(value, str) and value not in ACT2FN
    ]
    return wrong or (_built(checkpoint, where) if sound else [])


def _built(checkpoint: Checkpoint, where: str) -> list[Problem]:
    """What keeps transformers from building the model (no weight is read), and weights of other shapes than its own."""
    try:
        model = empty_model(checkpoint.path, None)
    except ImportError as error:
        why = " ".join(str(error).split()).partition(". ")[0]
        return [Problem(where, f"is of a model that needs a library more ({why})", "Install it.")]
    except Exception as error:  # whatever its class does with numbers that it never looked at
        why = str(error.__cause__ or error).partition("\n")[0]
        return [Problem(where, f"transformers can build no model of it ({why})", "Mend the config.")]
    if checkpoint.quantization is not None:
        return []
    shapes = checkpoint.shapes()
    return [
        Problem(name, f"is {shapes[name]}, the config implies {tuple(parameter.shape)}", _OTHER)
        for name, parameter in model.named_parameters()
        if name in shapes and shapes[name] != tuple(parameter.shape)
    ]


def _numbers(settings: Mapping[str, Any], where: str) -> list[Problem]:
    """Numbers that no model can compute with."""
    wrong: list[Problem] = []
    unused = "sliding_window" if settings.get("use_sliding_window") is False else None
    for name, value in settings.items():
        if isinstance(value, Mapping):
            wrong += _numbers(value, f"{where}: {name}")
            continue
        numbers = [it for it in (value if isinstance(value, list) else [value]) if isinstance(it, int | float)]
        finite = numbers[:1] if name in _ENDLESS else numbers
        if any(math.isnan(it) for it in numbers) or any(math.isinf(it) for it in finite):
            must = "a finite number"
        elif _POSITIVE.fullmatch(name) and name != unused and not all(number > 0 for number in numbers):
            must = "above zero"
        elif _NOT_NEGATIVE.fullmatch(name) and not all(number >= 0 for number in numbers):
            must = "zero or more"
        elif _AT_MOST_ONE.fullmatch(name) and not all(number <= 1 for number in numbers):
            must = "at most one"
        elif _SCALE.fullmatch(name) and not all(abs(number) <= _LARGEST for number in numbers):
            must = f"at most {_LARGEST:g}"
        else:
            continue
        wrong.append(Problem(f"{where}: {name}", f"is {value!r:.100}, and must be {must}", "Mend the config."))
    return wrong
