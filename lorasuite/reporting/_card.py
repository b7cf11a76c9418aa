"""The model card of a migrated adapter: Hub metadata and what a reader needs to trust it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasuite.reporting._names import ARMS, Z, wilson
from lorasuite.reporting._tables import comparison, task_comparison

#: The Hub's own words for what is measured on held-out rows.
HELD_OUT = {"exact_match": "Exact match", "bits_per_byte": "Bits per byte"}


def model_card(record: Mapping[str, Any]) -> str:
    """``README.md`` of a migration: metadata (``base_model`` the new one only, results as ``model-index``) and a text.

    Raises:
        ValueError: if huggingface_hub refuses the metadata.
    """
    from huggingface_hub import ModelCardData

    new, old, adapter = record["new_base"], record["old_base"], record["adapter"]
    results = _results(record)
    metadata = ModelCardData(
        base_model=new["name"],
        base_model_relation="adapter",
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "lorasuite", "adapter-migration"],
        model_name=f"{adapter['name']} for {new['name']}" if results else None,
        eval_results=results or None,
    )
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        "",
        f"# {adapter['name']} for {new['name']}",
        "",
        f"LoRA adapter moved from `{old['name']}` to `{new['name']}` by lorasuite {record['versions']['lorasuite']}, "
        f"method `{record['method']}`.",
    ]
    tuned = record["finetune"]
    if tuned:
        lines += [
            "",
            f"Fine-tuned on {tuned['samples']} samples for {tuned['steps']} steps "
            f"at learning rate {tuned['learning_rate']:g}.",
        ]
    verdict = record.get("verdict")
    if verdict:
        lines += ["", f"Verdict: **{verdict['verdict']}**. {verdict['reason'][:1].upper()}{verdict['reason'][1:]}."]
    columns, rows = comparison(record["evaluation"])
    if rows:
        lines += ["", *_table(["arm", *columns, "n"], [[row["name"], *row["cells"], str(row["n"])] for row in rows])]
    columns, rows = task_comparison(record.get("tasks", {}))
    if rows:
        lines += ["", *_table(["arm", *columns], [[row["name"], *row["cells"]] for row in rows])]
    if rows or record["evaluation"]:
        lines += ["", "± is one standard error over the held-out rows."]
    lines += [
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{new["id"]}"'
        + (f', revision="{new["revision"]}")' if new["revision"] else ")"),
        'model = PeftModel.from_pretrained(base, "<this directory>")',
        "```",
        "",
        "## Provenance",
        "",
        *_table(["", "name", "fingerprint"], list(_provenance(record))),
        "",
        f"Seed {record.get('seed')}, algorithm version {record.get('algorithm_version')}. "
        "How it was made is in `migration.json` of the directory it was made in; `report.html` there shows it.",
        "",
    ]
    return "\n".join(lines)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _provenance(record: Mapping[str, Any]) -> Any:
    for key, title in {"old_base": "old base", "new_base": "new base", "adapter": "old adapter"}.items():
        part = record[key]
        revision = f" at `{part['revision']}`" if part.get("revision") else ""
        yield [title, f"`{part['name']}`{revision}", f"`{part['fingerprint']}`"]


def _results(record: Mapping[str, Any]) -> list[Any]:
    """The published arm's scores as the Hub's ``model-index``, with their 95 % intervals."""
    from huggingface_hub import EvalResult

    measured = {**record["evaluation"], **record.get("tasks", {})}
    arm = next((arm for arm in ("migrated+lft", "migrated") if arm in measured), None)
    if arm is None:
        return []
    results = []
    rows = record["evaluation"].get(arm, {})
    held_out = Path(str((record.get("settings") or {}).get("eval_data") or "held-out rows")).name
    for metric, title in HELD_OUT.items():
        value, error = rows.get(metric), rows.get(f"{metric}_stderr")
        if value is None:
            continue
        ends = wilson(value, rows["n"]) if metric == "exact_match" else _normal(value, error)
        results.append(_result(EvalResult, held_out, "held-out", metric, title, value, ends, rows["n"], arm))
    for task, score in record.get("tasks", {}).get(arm, {}).items():
        for name, value in score["metrics"].items():
            metric = name.split(",")[0]
            ends = _normal(value, score["stderr"].get(name))
            results.append(_result(EvalResult, task, task, metric, name, value, ends, score.get("n"), arm))
    return results


def _normal(value: float, error: float | None) -> tuple[float, float] | None:
    return None if error is None else (value - Z * error, value + Z * error)


def _result(
    kind: Any,
    dataset: str,
    dataset_type: str,
    metric: str,
    title: str,
    value: float,
    ends: tuple[float, float] | None,
    n: int | None,
    arm: str,
) -> Any:
    arguments: dict[str, Any] = {} if n is None else {"samples": n}
    if ends is not None:
        arguments["confidence_interval_95"] = [round(end, 6) for end in ends]
    return kind(
        task_type="text-generation",
        task_name=ARMS.get(arm, arm),
        dataset_name=dataset,
        dataset_type=dataset_type,
        metric_type=metric,
        metric_name=title,
        metric_value=round(value, 6),
        metric_args=arguments or None,
    )
