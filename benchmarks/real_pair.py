"""A LoRA between two really pretrained tiny models: what the paper's method does on a hard pair.

    python benchmarks/real_pair.py --models DIR --text FILE.txt --output DIR

``--models`` holds ``stories260K`` and ``TinyStories-656K``; ``--text`` is any plain text. A rank-8 adapter is trained
on the first nine tenths of the text for the old model, migrated with calibration on the same text, fine-tuned on 100
passages (three learning rates, chosen on held-out passages, for the control too), and everything is evaluated in bits
per byte on passages of the last tenth. A LoRA trained on all passages is the reference.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from peft import LoraConfig

from flows.migrate_adapter import migrate_adapter
from lorasuite.bases import load_tokenizer
from lorasuite.data import read_rows
from lorasuite.evaluation import EvaluationSettings, evaluate
from lorasuite.training import FinetuneSettings, finetune
from lorasuite.zoo import write_rows

PASSAGE = 600  # characters
RATES = (1e-3, 3e-3, 1e-2)


def passages(text: str) -> list[dict[str, str]]:
    """Consecutive passages that end at a space, as text rows."""
    rows, start = [], 0
    while start + PASSAGE < len(text):
        end = text.rfind(" ", start, start + PASSAGE)
        rows.append({"text": text[start:end].strip()})
        start = end
    return rows


def train(base: Path, rows: Path, output: Path, epochs: float, rate: float) -> Path:
    """A rank-8 LoRA of attention and MLP trained on every passage."""
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    finetune(
        str(base),
        load_tokenizer(base),
        read_rows(rows),
        FinetuneSettings(learning_rate=rate, epochs=epochs, batch_size=16, cutoff=384),
        adapter=None,
        lora=lora,
        output=output,
        work_dir=output.with_suffix(".work"),
        progress=lambda step, total, loss: print(f"\r{step}/{total} {loss:.3f}", end="", file=sys.stderr),
    )
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--method", default="lorasuite")
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True)
    old, new = arguments.models / "stories260K", arguments.models / "TinyStories-656K"
    rows = passages(arguments.text.read_text(encoding="utf-8"))
    cut = len(rows) * 9 // 10
    write_rows(rows[:cut], output / "train.jsonl")
    write_rows(rows[cut : cut + 100], output / "test.jsonl")
    adapter = train(old, output / "train.jsonl", output / "adapter", arguments.epochs, 3e-3)
    record = migrate_adapter(
        {
            "adapter": str(adapter),
            "old_base": str(old),
            "new_base": str(new),
            "output": str(output / "migrated"),
            "train_data": str(output / "train.jsonl"),
            "eval_data": str(output / "test.jsonl"),
            "method": arguments.method,
            "candidates": ["all"] if arguments.method == "auto" else [],
            "learning_rates": RATES,
            "finetune": {"batch_size": 16, "cutoff": 384},
            "rehearsal": 0,
        }
    )
    reference = train(new, output / "train.jsonl", output / "reference", arguments.epochs, 3e-3)
    retrained = evaluate(
        str(new),
        load_tokenizer(new),
        read_rows(output / "test.jsonl"),
        EvaluationSettings(),
        adapters={"retrained": reference},
    )
    arms = {**record["evaluation"], "retrained on everything": retrained["retrained"].summary()}
    table = {arm: {"bits_per_byte": a["bits_per_byte"], "stderr": a["bits_per_byte_stderr"]} for arm, a in arms.items()}
    (output / "result.json").write_text(json.dumps({"arms": table, "candidates": record["candidates"]}, indent=2))
    for entry in record["candidates"]:
        print(f"candidate {entry['method']:18} scale {entry['scale']:<5g} {entry['loss']:.4f} nats/token")
    for arm, row in table.items():
        print(f"{arm:28} {row['bits_per_byte']:.4f} ± {row['stderr']:.4f}")


if __name__ == "__main__":
    main()
