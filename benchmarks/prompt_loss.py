"""Train an adapter as trainers do that mask nothing: with the loss on the prompts as on the answers.

    python benchmarks/prompt_loss.py --base BASE --rows train.jsonl --count 4000 --output ADAPTER

A plain loop over PEFT: rank 16, alpha 32, every projection, 3 epochs in batches of 16 at 1e-3, linear after a warm-up
of a twentieth. For the grid ``prompt-loss`` of :mod:`benchmarks.real`; nothing of lorasuite's fine-tune is in it.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from lorasuite.bases import load_tokenizer
from lorasuite.data import IGNORED, encode_rows, read_rows
from lorasuite.training import collate

EPOCHS, BATCH, RATE, WARM = 3, 16, 1e-3, 20


def train(base: Path, rows: Path, count: int, output: Path) -> None:
    """Train on the first ``count`` rows and write the adapter to ``output``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    random.seed(0)
    examples = encode_rows(read_rows(rows)[:count], load_tokenizer(base)).examples
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to(device)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in weights:
        parameter.data = parameter.data.float()
    steps = EPOCHS * -(-len(examples) // BATCH)
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, steps // WARM), steps)
    done = 0
    for _ in range(EPOCHS):
        order = random.sample(range(len(examples)), len(examples))
        for start in range(0, len(order), BATCH):
            batch = collate([examples[n] for n in order[start : start + BATCH]])
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            with torch.autocast(device, torch.bfloat16):
                loss = model(**inputs, labels=labels.to(device)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            done += 1
            if done % 50 == 0 or done == steps:
                print(f"{done} of {steps}: loss {float(loss.detach()):.3f}", flush=True)
    model.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="JSONL of prompt and completion")
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    train(given.base, given.rows, given.count, given.output)


if __name__ == "__main__":
    main()
