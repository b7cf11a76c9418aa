"""Settings of untrained adapters: the fresh LoRA that every migrated one is compared with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasuite.adapters._reader import Adapter
from lorasuite.adapters._writer import fan_in_fan_out
from lorasuite.bases import Architecture, Role
from lorasuite.errors import ConfigError, Problem


def fresh_lora(adapter: Path, architecture: Architecture) -> dict[str, Any]:
    """Settings of an untrained LoRA like an adapter: its rank, alpha and modules, in every layer of the base.

    It is the control of a fine-tune that starts from the adapter: what one would train without it. The settings are
    JSON, for :func:`fresh_config`.

    Raises:
        CheckpointError, AdapterError: as :meth:`Adapter.open`.
    """
    opened = Adapter.open(adapter)
    names = sorted({found[1].name for path in opened.modules if (found := architecture.locate(path))})
    inside = architecture.experts.path if architecture.experts is not None else ""
    parts = (architecture.locate_expert(path) for path in opened.modules)
    experts = {f"{inside}.{part[2].name}" for part in parts if part is not None}
    return {
        "r": opened.config["r"] if experts else opened.rank,
        "lora_alpha": opened.config["lora_alpha"],
        "use_rslora": bool(opened.config.get("use_rslora")),
        "use_dora": bool(opened.config.get("use_dora")),
        "fan_in_fan_out": fan_in_fan_out(architecture),
        "target_modules": _everywhere(names, architecture),
        **({"target_parameters": sorted(experts)} if experts else {}),
    }


def untrained(
    roles: Sequence[Role], architecture: Architecture, *, kind: str, rank: int, scaling: float, steps: int
) -> dict[str, Any]:
    """Settings of an untrained adapter of some projections in every layer of a base. JSON, for :func:`fresh_config`.

    A fused module is trained as a whole where one of its roles is asked for.

    Args:
        kind: ``lora``, ``dora``, or ``adalora``, which begins with half as much rank again and prunes down to
            ``rank`` from the first to the last tenth of its training.
        scaling: alpha / rank.
        steps: optimiser steps of its training, which only AdaLoRA has to know.

    Raises:
        ConfigError: for AdaLoRA in fewer than ten steps.
    """
    names = sorted(module.name for module in architecture.modules if set(module.roles) & set(roles))
    settings: dict[str, Any] = {
        "r": rank,
        "lora_alpha": scaling * rank,
        "use_rslora": False,
        "use_dora": kind == "dora",
        "fan_in_fan_out": fan_in_fan_out(architecture),
        "target_modules": _everywhere(names, architecture),
    }
    if kind != "adalora":
        return settings
    if steps < 10:
        raise ConfigError(Problem("adalora", f"cannot prune in {steps} steps", "Train for at least ten."))
    start, tenth = rank + (rank + 1) // 2, steps // 10
    del settings["r"], settings["use_rslora"], settings["use_dora"]
    schedule = {"init_r": start, "target_r": rank, "total_step": steps, "tinit": tenth, "tfinal": tenth}
    return {**settings, **schedule, "lora_alpha": scaling * start}


def _everywhere(names: Sequence[str], architecture: Architecture) -> list[str] | str:
    """PEFT's ``target_modules`` for block modules of every layer."""
    if not architecture.text_config or not names:
        return list(names)
    # A name alone would match a vision tower's modules, too: PEFT takes one string as a pattern of whole paths.
    return rf"{re.escape(architecture.layers)}\.\d+\.({'|'.join(map(re.escape, names))})"


def fresh_config(settings: Mapping[str, Any]) -> Any:
    """The PEFT config of :func:`fresh_lora` or :func:`untrained`."""
    from peft import AdaLoraConfig, LoraConfig, TaskType

    chosen = AdaLoraConfig if "init_r" in settings else LoraConfig
    return chosen(**settings, lora_dropout=0.0, bias="none", task_type=TaskType.CAUSAL_LM)
