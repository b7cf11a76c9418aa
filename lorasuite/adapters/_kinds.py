"""The kinds of PEFT adapters and the fields of their configs: which are read, and why the others are not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from lorasuite.adapters._config_types import LARGEST_ALPHA, LARGEST_RANK, type_problems
from lorasuite.errors import Problem

#: What an adapter is written as; a DoRA stays one.
OutputType = Literal["lora", "adalora"]

#: Rank of the new adapter where the old one's method has none.
DEFAULT_RANK = 16

#: Fields of a LoRA config that do not change what ΔW is, or that are read here. Any other one that is set is refused.
UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices", "use_dora", "use_rslora", "velora_config",
}  # fmt: skip
#: LoRA fields that are known, and refused where they are set.
REFUSED_FIELDS = {
    "alora_invocation_tokens": "switches the adapter on from certain tokens on, which the new vocabulary may not have",
    "arrow_config": "routes each token to one of several adapters",
    "kasa_config": "takes the smallest directions out of the old base's weights before training",
    "layer_replication": "builds a deeper base model, whose layers have no counterpart of their own",
    "lora_bias": "adds a bias to each update, which no LoRA without one can hold",
    "megatron_config": "belongs to a model split by Megatron",
    "monteclora_config": "learns a distribution of updates, not one",
    "use_bdlora": "makes the factors block-diagonal, which the file does not show",
    "use_qalora": "pools each input in groups before the update",
}
#: The training schedule of AdaLoRA, and what it inherits from LoRA.
ADALORA_UNDERSTOOD = UNDERSTOOD - {"use_dora", "target_parameters", "trainable_token_indices", "modules_to_save"} | {
    "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
}  # fmt: skip

#: Initialisations that change the base weight before training: ΔW is against another base.
CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)
#: Those of them that can be computed again from the old base's weight.
REPRODUCIBLE = ("pissa", "olora")

#: Methods whose ΔW depends on the old base's own weight: most multiply it.
WEIGHTED = (
    "BOFT", "DEFT", "GLORA", "HIRA", "HRA", "IA3", "OFT", "OSF", "PEANUT", "PSOFT", "ROAD", "SHIRA", "SUPERTUNING",
    "UNILORA",
)  # fmt: skip
#: Those of them that change a module's bias, too.
BIASED = ("GLORA", "IA3", "ROAD")

#: Methods that leave each weight with a ΔW, read through PEFT's own classes.
DELTA = (
    "C3A", "DELORA", "FOURIERFT", "GRALORA", "LOHA", "LOKR", "MISS", "RANDLORA", "TINYLORA", "VBLORA", "VERA", "WAVEFT",
    *WEIGHTED,
)  # fmt: skip

#: Methods whose tensors outside the modules are shared by all of them: every module is built to read one.
SHARED = ("VERA", "RANDLORA", "VBLORA", "TINYLORA")
#: Methods that number the modules as they come in the model.
ORDERED = ("TINYLORA",)
#: Methods whose ``r`` is not a rank.
OTHER_R = ("OFT", "SHIRA", "SUPERTUNING")

_PROMPT = "trains virtual tokens in the old base's hidden space, not weights"
_ACTIVATION = "computes its update from each input: there is no ΔW"
_ROUTES = "mixes several adapters by a router, whose inputs the new base does not have"
#: PEFT type → why there is no update to move.
REFUSED = {
    "ADAMSS": "writes to rows found by clustering the old base's weights, and which rows is not in the file",
    "ADAPTION_PROMPT": _PROMPT,
    "BEFT": "trains biases only",
    "CARTRIDGE": _PROMPT,
    "CPT": _PROMPT,
    "FROD": "writes each weight in a basis made of the weights of all layers, which is not in the file",
    "LILY": _ACTIVATION,
    "LN_TUNING": "trains norm gains only",
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "POLY": _ROUTES,
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "PVERA": "learns a distribution of updates, not one",
    "P_TUNING": _PROMPT,
    "SHADOW": _ACTIVATION,
    "TRAINABLE_TOKENS": "trains token embeddings only: train them with a LoRA (trainable_token_indices)",
    "XLORA": _ROUTES,
}


def kind_of(config: Mapping[str, Any]) -> str:
    """The PEFT type, in capitals."""
    return str(config.get("peft_type") or "").upper()


def needs_weights(config: Mapping[str, Any]) -> bool:
    """Whether the method's ΔW depends on the old base's weights, and not on their shapes alone."""
    kind = kind_of(config)
    return kind in WEIGHTED or (kind == "MISS" and config.get("init_weights") == "bat")


def changes_base(config: Mapping[str, Any]) -> bool:
    """Whether its initialisation changed the base's weights before training."""
    init = config.get("init_lora_weights")
    return isinstance(init, str) and bool(CHANGES_BASE.search(init))


def config_problems(config: Mapping[str, Any], where: str, initial: bool = False) -> list[Problem]:
    """Everything in an adapter config that is not migrated, by field.

    Args:
        initial: whether the adapter before training lies beside it, against which a changed base can be undone.
    """
    if wrong := type_problems(config, where):
        return wrong
    kind = kind_of(config)
    if kind in REFUSED:
        return [Problem(f"{where}: peft_type", f"{kind} {REFUSED[kind]}", "Train a LoRA adapter.")]
    if kind not in ("LORA", "ADALORA", *DELTA):
        return [Problem(f"{where}: peft_type", f"{kind or 'none'} adapters are not supported", "Train a LoRA adapter.")]
    if kind in DELTA:
        return _delta_problems(config, where)
    problems: list[Problem] = []
    for name in ("lora_alpha", "r" if kind == "LORA" else "init_r"):
        value, largest = config.get(name), LARGEST_ALPHA if name == "lora_alpha" else LARGEST_RANK
        kind_of_number = int | float if name == "lora_alpha" else int
        if not isinstance(value, kind_of_number) or isinstance(value, bool) or not 0 < value <= largest:
            problems.append(Problem(f"{where}: {name}", f"is {value!r}", "It must be a positive number."))
    understood = UNDERSTOOD if kind == "LORA" else ADALORA_UNDERSTOOD
    problems += [
        Problem(f"{where}: {name}", REFUSED_FIELDS[name], "Train without it.")
        if name in REFUSED_FIELDS
        else _not_understood(where, name, value)
        for name, value in _given(config)
        if name not in understood
    ]
    if config.get("bias") not in (None, "none", "lora_only"):
        problems.append(
            Problem(
                f"{where}: bias",
                f"{config['bias']!r} also trains biases of modules without an update, whose counterparts are not known",
                "Train with bias='lora_only' or 'none'.",
            )
        )
    if config.get("use_dora") and config.get("bias") not in (None, "none"):
        problems.append(Problem(f"{where}: bias", "is not migrated together with use_dora", "Train without one."))
    init = config.get("init_lora_weights")
    if isinstance(init, str) and CHANGES_BASE.search(init) and not initial and init.lower() not in REPRODUCIBLE:
        problems.append(
            Problem(
                f"{where}: init_lora_weights",
                f"{init!r} changes the base weights before training, in a way that cannot be computed again",
                "Put the adapter saved before training into a folder named *_init inside it, or convert it with PEFT's "
                "save_pretrained(path_initial_model_for_weight_conversion=…).",
            )
        )
    return problems


def _given(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The fields that are set: neither empty nor false."""
    return [(name, value) for name, value in config.items() if value not in (None, False, {}, [], "", "none")]


def _not_understood(where: str, name: str, value: Any) -> Problem:
    return Problem(
        f"{where}: {name}", f"{value!r} is not understood", "It may change what the adapter computes, so it is refused."
    )


def _delta_problems(config: Mapping[str, Any], where: str) -> list[Problem]:
    """Of a kind that PEFT reads: fields that its config class does not know, and what lies beside ΔW."""
    from dataclasses import fields

    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = kind_of(config)
    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[kind]) if kind in PeftType.__members__ else None
    if cls is None:
        return [Problem(f"{where}: peft_type", f"the installed PEFT has no {kind}", "Install a newer peft.")]
    known = {f.name for f in fields(cls)} | {"megatron_core", "qalora_group_size"}
    problems = [_not_understood(where, name, value) for name, value in _given(config) if name not in known]
    problems += [
        Problem(f"{where}: {name}", f"{value!r} is only migrated beside a LoRA", "Train without it.")
        for name, value in _given(config)
        if name in ("bias", "modules_to_save", "trainable_token_indices")
    ]
    needed = "save_indices" if kind == "UNILORA" else "save_projection"
    if needed in known and not config.get(needed, needed == "save_projection"):
        problems.append(
            Problem(
                f"{where}: {needed}",
                "is false: the random numbers ΔW is made of are not in the file",
                f"Train with {needed}=True.",
            )
        )
    return problems
