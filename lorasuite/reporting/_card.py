"""The model card of a migrated adapter: Hub metadata and what a reader needs to trust it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorasuite.adapters import WEIGHTS
from lorasuite.reporting._names import Z, code_span, markdown, wilson
from lorasuite.reporting._record import MigrationRecord
from lorasuite.reporting._tables import GENERAL_COLUMNS, comparison, general_costs, task_comparison

#: The Hub's own words for what is measured on held-out rows.
HELD_OUT = {"exact_match": "Exact match", "bits_per_byte": "Bits per byte"}


def model_card(record: MigrationRecord) -> str:
    """``README.md`` of a migration: metadata (``base_model`` the new one only, results as ``model-index``) and a text.

    Raises:
        ValueError: if huggingface_hub refuses the metadata.
    """
    from huggingface_hub import ModelCardData

    new, adapter, published = record.new_base, record.adapter, record.published
    results = _results(record)
    metadata = ModelCardData(
        base_model=new.name,
        base_model_relation="adapter",
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "lorasuite", "adapter-migration"],
        model_name=f"{adapter.name} for {new.name}" if results else None,
        eval_results=results or None,
    )
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        "",
        f"# {markdown(adapter.name)} for {markdown(new.name)}",
        "",
        _first_line(record),
    ]
    if published.learning_rate is not None:
        trained = "Trained" if published.is_new else f"Fine-tuned on {published.rows}"
        lines += ["", f"{trained} for {published.steps} steps at learning rate {published.learning_rate:g}."]
    reason = record.reason()
    lines += ["", f"Verdict: **{record.verdict.verdict}**. {markdown(reason[:1].upper() + reason[1:])}."]
    columns, rows = comparison(record.evaluation, record.label)
    if rows:
        lines += [
            "",
            *_table(["arm", *columns, "n"], [[markdown(row["name"]), *row["cells"], str(row["n"])] for row in rows]),
        ]
    columns, rows = task_comparison(record.tasks, record.label)
    if rows:
        lines += [
            "",
            *_table(["arm", *map(markdown, columns)], [[markdown(row["name"]), *row["cells"]] for row in rows]),
        ]
    if rows or record.evaluation:
        lines += ["", "± is one standard error over the held-out rows."]
    if costs := general_costs(record.general):
        lines += ["", "What the adapters cost their bases of general ability (a cost is what is lost):", ""]
        lines += _table(["measured on", *GENERAL_COLUMNS], [[markdown(row[0]), *row[1:]] for row in costs])
    lines += [
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({_literal(new.id)}"
        + (f", revision={_literal(new.revision)})" if new.revision else ")"),
        'model = PeftModel.from_pretrained(base, "<this directory>")',
        "```",
        "",
        *_prompts(record),
        "## Provenance",
        "",
        *_table(["", "name", "fingerprint"], list(_provenance(record))),
        "",
        f"Seed {record.seed}, algorithm version {record.algorithm_version}. "
        "How it was made is in `migration.json` of the directory it was made in; `report.html` there shows it.",
        "",
    ]
    return "\n".join(lines)


def _prompts(record: MigrationRecord) -> list[str]:
    """How the prompts were made that the adapter was trained and measured with; nothing in records of before."""
    if record.prompts is None:
        return []
    chat = "and its chat template" if record.prompts.new.chat_template is not None else "which has no chat template"
    said = f"Prompts are made by the tokenizer of {code_span(record.new_base.name)}, {chat}."
    return [f"{said} Instruction rows become prompts by the template {code_span(record.prompts.template)}.", ""]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _literal(text: str) -> str:
    """A text as Python's literal, in double quotes and on one line, which ends no block of code."""
    return json.dumps(text).replace("```", "\\x60\\x60\\x60")


def _first_line(record: MigrationRecord) -> str:
    """What was published, and of what and by what it was made."""
    old, new = code_span(record.old_base.name), code_span(record.new_base.name)
    version = record.versions.get("lorasuite")  # none where it ran from a checkout that is not installed
    made = f"lorasuite {markdown(version)}" if version else "lorasuite"
    published = record.published
    if published.transform is not None:
        return f"LoRA adapter moved from {old} to {new} by {made}, method {code_span(published.transform)}."
    adapter = code_span(record.adapter.name)
    return f"{markdown(published.headline)}. Nothing of the adapter {adapter} of {old} is in it; made by {made}."


def _provenance(record: MigrationRecord) -> Iterator[list[str]]:
    for title, base in {"old base": record.old_base, "new base": record.new_base}.items():
        revision = f" at {code_span(base.revision)}" if base.revision else ""
        yield [title, f"{code_span(base.name)}{revision}", code_span(base.fingerprint)]
    yield ["old adapter", code_span(record.adapter.name), code_span(record.adapter.fingerprint)]
    if record.weights_sha256 is not None:
        yield ["this adapter", f"`{WEIGHTS}`", f"`{record.weights_sha256}`"]


def _results(record: MigrationRecord) -> list[Any]:
    """The published arm's scores as the Hub's ``model-index``, with their 95 % intervals."""
    from huggingface_hub import EvalResult

    published = record.published
    if published.arm is None:
        return []
    arm, label = published.arm, published.label
    results = []
    rows = record.evaluation.get(arm)
    held_out = Path(str(record.settings.get("eval_data") or "held-out rows")).name
    for metric, title in HELD_OUT.items():
        value, error = getattr(rows, metric, None), getattr(rows, f"{metric}_stderr", None)
        if rows is None or value is None:
            continue
        ends = wilson(value, rows.n) if metric == "exact_match" else _normal(value, error)
        results.append(_result(EvalResult, held_out, "held-out", metric, title, value, ends, rows.n, label))
    for task, score in record.tasks.get(arm, {}).items():
        for name, value in score.metrics.items():
            metric = name.split(",")[0]
            ends = _normal(value, score.stderr.get(name))
            results.append(_result(EvalResult, task, task, metric, name, value, ends, score.n, label))
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
    name: str,
) -> Any:
    arguments: dict[str, Any] = {} if n is None else {"samples": n}
    if ends is not None:
        arguments["confidence_interval_95"] = [round(end, 6) for end in ends]
    return kind(
        task_type="text-generation",
        task_name=name,
        dataset_name=dataset,
        dataset_type=dataset_type,
        metric_type=metric,
        metric_name=title,
        metric_value=round(value, 6),
        metric_args=arguments or None,
    )
