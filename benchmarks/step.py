"""What a fine-tuning step costs, against its floor; and the losses of written rows.

    python benchmarks/step.py --base DIR --rows FILE.jsonl     a model and rows of yours
    python benchmarks/step.py                                  random weights and words, no files

The floor is a hand-written loop on as many tokens without padding: forward through the adapted base, the head at label
positions, backward, AdamW. It runs before and after ``finetune``, whose steps are timed one by one; medians are
compared, of wall time and, on a CPU, of the process's CPU time, which other work on the machine disturbs less. One
batch of 16 rows, an adapter of rank 16 on every projection. Peak memory is the process's (CPU) or the device's, of the
fine-tune with the base in it. On cores that other work shares, set ``OMP_NUM_THREADS=1``: two threads that wait for
each other there took up to ten times as long as one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorasuite.bases import LoadSettings, load_model, load_tokenizer
from lorasuite.data import IGNORED, Row, encode_rows, read_rows
from lorasuite.teacher import text_losses
from lorasuite.training import FinetuneSettings, finetune

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora() -> LoraConfig:
    """Rank 16 on every projection."""
    return LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")


def random_base(hidden: int, layers: int, vocabulary: int) -> tuple[Any, Any]:
    """A Llama of random weights, and a tokenizer of numbered words."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), tie_word_embeddings=True,
    )  # fmt: skip
    raw = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, **{f"w{n}": n for n in range(2, 1000)}}, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>")
    return LlamaForCausalLM(config).eval().requires_grad_(False), tokenizer


def random_rows(count: int) -> list[Row]:
    """Prompts of 10 to 60 words, answers of 6."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 60, (count,), generator=generator).tolist()
    words = [[f"w{n}" for n in torch.randint(2, 1000, (length + 6,), generator=generator)] for length in lengths]
    return [Row(kind="completion", prompt=" ".join(w[:-6]), completion=" " + " ".join(w[-6:])) for w in words]


def clocks() -> tuple[float, float]:
    """Wall time and the process's CPU time, in seconds."""
    return time.perf_counter(), time.process_time()


def medians(marks: list[tuple[float, float]]) -> list[float]:
    """Median wall and CPU seconds between marks."""
    return [statistics.median(b[n] - a[n] for a, b in itertools.pairwise(marks)) for n in (0, 1)]


def floor(model: Any, examples: list[dict[str, list[int]]], steps: int, *, bf16: bool) -> list[float]:
    """Wall and CPU seconds of a step of the hand-written loop, after one to warm up."""
    device = next(model.parameters()).device
    rows = len(examples)
    width = -(-sum(len(example["input_ids"]) for example in examples) // rows)
    labels = -(-sum(label != IGNORED for example in examples for label in example["labels"]) // rows)
    ids = torch.tensor([token for example in examples for token in example["input_ids"]])
    ids = ids.repeat(2)[: rows * width].view(rows, width).to(device)
    wrapped = get_peft_model(model, lora()).train()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4)
    base = wrapped.get_base_model()
    marks = []
    for _ in range(steps + 1):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            states = base.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1 - labels : -1]
            logits = base.lm_head(states.flatten(0, 1)).float()
        torch.nn.functional.cross_entropy(logits, ids[:, -labels:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(clocks())
    wrapped.unload()
    return medians(marks)


def tuned(model: Any, tokenizer: Any, rows: list[Row], steps: int, *, device: str, precision: str) -> tuple[Any, Any]:
    """Wall and CPU seconds of a step of ``finetune`` after the first, and its result."""
    marks: list[tuple[float, float]] = []
    settings = FinetuneSettings(
        batch_size=len(rows), epochs=steps + 1, checkpoint_steps=10**6, precision=precision, schedule="constant",
        learning_rate=1e-4,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        result = finetune(
            model, tokenizer, rows, settings, adapter=None, lora=lora(), output=Path(folder) / "out",
            work_dir=Path(folder) / "work", device=device, progress=lambda *_: marks.append(clocks()),
        )  # fmt: skip
    return medians(marks), result


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="model directory; none: random weights")
    parser.add_argument("--rows", help="JSON lines; none: random words")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--losses", type=int, default=0, help="rows whose losses are taken as well")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of --base")
    given = parser.parse_args()
    if given.base:
        loading = LoadSettings(dtype=given.dtype)
        model, tokenizer = load_model(given.base, given.device, loading=loading), load_tokenizer(given.base)
    else:
        model, tokenizer = random_base(given.hidden, given.layers, given.vocabulary)
        model.to(given.device)
    if given.rows and not given.base:
        parser.error("--rows needs --base: the random model knows numbered words only")
    needed = max(given.batch, given.losses)
    rows = (read_rows(given.rows) if given.rows else random_rows(needed))[:needed]
    examples = encode_rows(rows[: given.batch], tokenizer).examples
    bf16 = given.precision == "bf16" or (given.precision == "auto" and given.device != "cpu")
    before = floor(model, examples, given.steps, bf16=bf16)
    steps, result = tuned(
        model, tokenizer, rows[: given.batch], given.steps, device=given.device, precision=given.precision
    )
    after = floor(model, examples, given.steps, bf16=bf16)
    least = [(one + other) / 2 for one, other in zip(before, after, strict=True)]
    found: dict[str, Any] = {
        "tokens": sum(len(example["input_ids"]) for example in examples),
        "floor_seconds": least[0],
        "step_seconds": steps[0],
        "ratio": steps[0] / least[0],
        "cpu_ratio": steps[1] / least[1],
        "peak_gib": result.peak_memory_bytes / 2**30,
        "losses": [round(entry["loss"], 5) for entry in result.losses],
    }
    if given.losses:
        started = time.perf_counter()
        total = sum(loss.nats for loss in text_losses(model, tokenizer, rows[: given.losses]) if loss)
        found |= {"losses_seconds": time.perf_counter() - started, "losses_nats": total}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
