"""Evaluation outside a migration: one base, bare and with any number of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasuite.checkpoint import load_tokenizer, resolve
from lorasuite.config import torch_device
from lorasuite.data import read_rows
from lorasuite.errors import ConfigError, Problem
from lorasuite.evaluation import EvaluationSettings, evaluate, evaluate_tasks


def evaluate_adapters(
    base: str,
    adapters: list[str],
    eval_data: str | None,
    tasks: list[str],
    include_path: Path | None,
    settings: dict[str, Any],
    device: str,
    samples: Path | None,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Results by arm (``base`` and each adapter's directory name) on rows, and by task where lm-eval tasks are given.

    Raises:
        ConfigError: if there is nothing to evaluate on.
    """
    if not eval_data and not tasks:
        raise ConfigError(Problem("evaluate", "there is nothing to evaluate on", "Give --eval-data or --tasks."))
    path = resolve(base)
    arms: dict[str, Path | None] = {"base": None}
    for adapter in adapters:
        folder = resolve(adapter)
        name = folder.resolve().name
        arms[name if name not in arms else str(folder)] = folder
    tokenizer = load_tokenizer(path, trust_remote_code)
    options = EvaluationSettings.model_validate(settings)
    common: dict[str, Any] = {
        "adapters": arms,
        "device": torch_device(device),
        "trust_remote_code": trust_remote_code,
    }
    results: dict[str, Any] = {}
    if eval_data:
        found = evaluate(str(path), tokenizer, read_rows(eval_data), options, **common)
        for arm, result in found.items():
            results[arm] = result.summary()
            if samples is not None:
                samples.mkdir(parents=True, exist_ok=True)
                result.write_samples(samples / f"{Path(arm).name}.jsonl")
    scored = {}
    if tasks:
        scored = evaluate_tasks(str(path), tokenizer, tasks, options, include_path=include_path, **common)
    by_task = {
        arm: {task: score.model_dump(mode="json") for task, score in scores.items()} for arm, scores in scored.items()
    }
    return {"base": base, "results": results, "tasks": by_task}
