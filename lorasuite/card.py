"""The model card of a migrated adapter: Hub metadata and what a reader needs to trust it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorasuite.report import comparison


def model_card(record: Mapping[str, Any]) -> str:
    """``README.md`` of a migration: metadata (``base_model`` the new base only) and a short text."""
    from huggingface_hub import ModelCardData

    new, old, adapter = record["new_base"], record["old_base"], record["adapter"]
    metadata = ModelCardData(
        base_model=new["name"],
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "lorasuite", "adapter-migration"],
    )
    columns, rows = comparison(record["evaluation"])
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        "",
        f"# {adapter['name']} for {new['name']}",
        "",
        f"LoRA adapter moved from `{old['id']}` to `{new['id']}` by lorasuite {record['versions']['lorasuite']}, "
        f"method `{record['method']}`.",
    ]
    tuned = record["finetune"]
    if tuned:
        lines += [
            "",
            f"Fine-tuned on {tuned['samples']} samples for {tuned['steps']} steps "
            f"at learning rate {tuned['learning_rate']:g}.",
        ]
    if rows:
        lines += ["", "| arm | " + " | ".join(columns) + " | n |", "|---" * (len(columns) + 2) + "|"]
        lines += [f"| {row['name']} | " + " | ".join(row["cells"]) + f" | {row['n']} |" for row in rows]
        lines += ["", "± is one standard error over the held-out rows."]
    lines += [
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{new["id"]}")',
        'model = PeftModel.from_pretrained(base, "<this directory>")',
        "```",
        "",
        "How it was made is in `migration.json`; `report.html` shows it.",
        "",
    ]
    return "\n".join(lines)
