"""Make the zoo: train the bases from scratch, the adapters on them, and measure everything.

    python -m benchmarks.zoo.train --pair all --stage all

About 35 minutes on two idle CPU cores. Every run uses one thread, so the figures do not depend on how many run
side by side. What is measured is what is saved: models are read back from their float16 files.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from lorasuite import zoo
from lorasuite.zoo import lists

Row = Mapping[str, str]
Model = Any
"""A model of transformers or PEFT, which ship no types."""
Metrics = dict[str, Any]

IGNORED: Final = -100
PROMPT_WEIGHT: Final = 0.1
"""Weight of the prompt's loss in base training: prompts are mostly random, but bases model them."""

BASE_BATCH: Final = 128
BASE_LEARNING_RATE: Final = 3e-3
FIRST_STEPS: Final = {
    ("llama", "old"): 4000,
    ("llama", "new"): 3000,
    ("neox", "old"): 5000,
    ("neox", "new"): 3000,
}
FURTHER_STEPS: Final = 1000
MAX_ROUNDS: Final = 4
BASE_GOAL: Final = 97.0
"""Exact match that every operation needs in pairs, on the validation split; further rounds practise the rest."""

SAMPLES: Final = 10_000
EPOCHS: Final = 1
ADAPTER_BATCH: Final = 16
RANK: Final = 8
ALPHA: Final = 16
LEARNING_RATES: Final = (5e-3, 7e-3, 1e-2)
"""Each is tried in full: of the three adapters the one with the lowest validation loss is kept."""

VALIDATION_ROWS: Final = 500
TEST_ROWS: Final = 1000

ATTENTION: Final = ["q_proj", "k_proj", "v_proj", "o_proj"]
LLAMA_LINEAR: Final = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
NEOX_LINEAR: Final = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
NEOX_ATTENTION: Final = ["query_key_value", "dense"]
EVERY_LINEAR_TASKS: Final = ("orbit", "blend")
"""Tasks whose adapters change the MLP as well as the attention."""


def build_tokenizer(pair: str, side: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that puts the beginning-of-sequence token first and never ends a sequence.

    Llama's new vocabulary holds the old one's words under other ids, with words of its own; GPTNeoX keeps it.
    """
    words = ["<pad>", "<s>", "</s>", "<unk>", *lists.vocabulary(_extended(pair, side))]
    if _extended(pair, side):
        random.Random("vocabulary").shuffle(words)
    ids = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", ids["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
    )


def build_model(pair: str, side: str, tokenizer: PreTrainedTokenizerFast) -> Model:
    """An untrained base model."""
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if pair == "llama":
        shape = (
            {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
            if side == "old"
            else {
                "hidden_size": 96,
                "intermediate_size": 288,
                "num_hidden_layers": 6,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
            }
        )
        model = LlamaForCausalLM(LlamaConfig(**shape, **common))
    else:
        shape = (
            {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
            if side == "old"
            else {
                "hidden_size": 96,
                "intermediate_size": 384,
                "num_hidden_layers": 5,
                "num_attention_heads": 8,
            }
        )
        # Half of a head's dimensions rotate: a quarter, the default, of 12 would be an odd number.
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**shape, **common, rotary_pct=0.5))
    return model


def encode(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Token ids ``[bos] prompt completion [eos]`` and labels that ignore the prompt, padded on the right.

    Under causal attention nothing before the padding sees it, so no attention mask is needed.
    """
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    whole = tokenizer([row["prompt"] + row["completion"] for row in rows])["input_ids"]
    width = max(map(len, whole)) + 1
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), IGNORED)
    for index, (prompt, tokens) in enumerate(zip(prompts, whole, strict=True)):
        sequence = torch.tensor([*tokens, tokenizer.eos_token_id])
        ids[index, : len(sequence)] = sequence
        labels[index, len(prompt) : len(sequence)] = sequence[len(prompt) :]
    return ids, labels


@torch.no_grad()
def correct(model: Model, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> list[bool]:
    """Whether greedy generation would give each row's completion, exactly and with the end of sequence.

    It would if and only if, reading the right completion, the model's first choice is right at every place:
    one forward pass instead of one a token.
    """
    model.eval()
    found: list[bool] = []
    for start in range(0, len(rows), 500):
        ids, labels = _move(encode(tokenizer, rows[start : start + 500]), model)
        choices = model(input_ids=ids).logits[:, :-1].argmax(dim=-1)
        wanted = labels[:, 1:]
        found += ((choices == wanted) | (wanted == IGNORED)).all(dim=1).tolist()
    return found


@torch.no_grad()
def validation_loss(model: Model, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> float:
    """Mean loss of a completion's token."""
    model.eval()
    ids, labels = _move(encode(tokenizer, rows), model)
    logits = model(input_ids=ids).logits[:, :-1].transpose(1, 2)
    return float(nn.functional.cross_entropy(logits, labels[:, 1:], ignore_index=IGNORED))


def percent(found: Iterable[bool]) -> float:
    """The share of true values in percent."""
    values = list(found)
    return round(100 * sum(values) / len(values), 2)


def train(
    model: Model,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    learning_rate: float,
    pad: int | None,
    say: Callable[[str], None],
) -> None:
    """AdamW with 5 % warm-up and a linear decay to zero; with ``pad`` the prompt counts a little too."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    model.train()
    for step, batch in enumerate(islice(batches, steps), start=1):
        ids, labels = _move(batch, model)
        logits = model(input_ids=ids).logits[:, :-1].transpose(1, 2)
        loss = nn.functional.cross_entropy(logits, labels[:, 1:], ignore_index=IGNORED)
        total = loss
        if pad is not None:
            prompt = ids.masked_fill((labels != IGNORED) | (ids == pad), IGNORED)
            total = loss + PROMPT_WEIGHT * nn.functional.cross_entropy(logits, prompt[:, 1:], ignore_index=IGNORED)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == steps:
            say(f"step {step}/{steps}, loss {loss.item():.4f}")


def make_base(pair: str, side: str, output: Path, seed: int, device: str) -> Metrics:
    """Train one base model from scratch, in rounds until it knows every operation; save and measure each round."""
    say = _say(f"{pair} {side}")
    # Old and new start from different seeds and read different examples: they agree in skill, not in weights.
    seed += {"old": 0, "new": 100}[side] + {"llama": 0, "neox": 10}[pair]
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(pair, side)
    model = build_model(pair, side, tokenizer).to(device)
    extended = _extended(pair, side)
    directory = output / pair / side
    rounds: list[Metrics] = []
    weak: set[str] = set()
    while not rounds or (weak and len(rounds) < MAX_ROUNDS):
        steps = FURTHER_STEPS if rounds else FIRST_STEPS[pair, side]
        started = time.perf_counter()
        batches = base_batches(tokenizer, weak, seed + 1000 * len(rounds), extended)
        train(model, batches, steps, BASE_LEARNING_RATE, tokenizer.pad_token_id, say)
        seconds = time.perf_counter() - started

        model.half().save_pretrained(directory)
        _save_tokenizer(tokenizer, directory)
        model, tokenizer = load(directory, device)
        known = measure_base(model, tokenizer, "validation", extended)
        weak = {name for name in lists.OPERATIONS if known[f"{name} in pairs"] < BASE_GOAL}
        rounds.append({"steps": steps, "seconds": round(seconds, 1), "below goal": sorted(weak)})
        say(f"round {len(rounds)}: exact match {known['overall']} % in {seconds:.0f} s, weak: {sorted(weak)}")
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": len(tokenizer),
        "seed": seed,
        "rounds": rounds,
        "batch": BASE_BATCH,
        "learning_rate": BASE_LEARNING_RATE,
        "exact_match": measure_base(model, tokenizer, "test", extended),
    }


def base_batches(
    tokenizer: PreTrainedTokenizerFast, weak: set[str], seed: int, extended: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of which a fifth is single operations; programs with a weak operation come three times as often."""
    programs = [program for program in lists.PROGRAMS for _ in range(3 if weak.intersection(program) else 1)]
    alone = lists.examples([(name,) for name in lists.OPERATIONS], "train", seed, extended)
    every = lists.examples(programs, "train", seed + 1, extended)
    while True:
        first = list(islice(alone, BASE_BATCH // 5))
        yield encode(tokenizer, first + list(islice(every, BASE_BATCH - len(first))))


def measure_base(model: Model, tokenizer: PreTrainedTokenizerFast, split: str, extended: bool) -> Metrics:
    """Exact match on held-out lists: overall, for one and for two operations, and by operation."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for place, program in enumerate(lists.PROGRAMS):
        rows = list(islice(lists.examples([program], split, place, extended), 50))
        found = correct(model, tokenizer, rows)
        hits["overall"] += found
        hits["alone" if len(program) == 1 else "in pairs"] += found
        for name in set(program):
            hits[f"{name} alone" if len(program) == 1 else f"{name} in pairs"] += found
    return {name: percent(found) for name, found in sorted(hits.items())}


def make_adapter(pair: str, side: str, task: str, output: Path, seed: int, device: str) -> Metrics:
    """Train one task's LoRA on one base: keep the best learning rate's, save and measure it."""
    say = _say(f"{pair} {side} {task}")
    base = output / pair / side
    model, tokenizer = load(base, device)
    training = zoo.rows(pair, task, "train", SAMPLES, seed)
    validation = zoo.rows(pair, task, "validation", VALIDATION_ROWS, seed)
    test = zoo.rows(pair, task, "test", TEST_ROWS, seed)
    bare = percent(correct(model, tokenizer, test))
    every_linear = task in EVERY_LINEAR_TASKS
    targets = {
        "llama": LLAMA_LINEAR if every_linear else ATTENTION,
        "neox": NEOX_LINEAR if every_linear else NEOX_ATTENTION,
    }[pair]
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator = random.Random(seed)
        while True:
            order = generator.sample(training, len(training))
            for start in range(0, len(order), ADAPTER_BATCH):
                yield encode(tokenizer, order[start : start + ADAPTER_BATCH])

    losses: dict[float, float] = {}
    started = time.perf_counter()
    for learning_rate in LEARNING_RATES:
        torch.manual_seed(seed)
        candidate: Model = get_peft_model(load(base, device)[0], config)
        train(candidate, batches(), EPOCHS * SAMPLES // ADAPTER_BATCH, learning_rate, None, say)
        loss = round(validation_loss(candidate, tokenizer, validation), 5)
        if loss < min(losses.values(), default=math.inf):
            adapted, best = candidate, learning_rate
        losses[learning_rate] = loss
    seconds = (time.perf_counter() - started) / len(LEARNING_RATES)
    say(f"bare {bare} %, validation loss by learning rate {losses}")

    directory = output / pair / ("adapters" if side == "old" else "retrained") / task
    adapted.half()
    adapted.peft_config["default"].base_model_name_or_path = f"zoo/{pair}/{side}"
    # Embeddings are not adapted; left to decide for itself, PEFT would look the base up by its name.
    adapted.save_pretrained(directory, save_embedding_layers=False)
    # PEFT writes a template to be filled in; README.md beside this file says what these adapters are.
    (directory / "README.md").unlink(missing_ok=True)

    measured = PeftModel.from_pretrained(load(base, device)[0], directory)
    metrics = {
        "bare": bare,
        "adapted": percent(correct(measured, tokenizer, test)),
        "learning_rate": best,
        "validation_loss_by_learning_rate": {str(rate): loss for rate, loss in losses.items()},
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for name, p in measured.named_parameters() if "lora_" in name),
        "targets": targets,
        "seed": seed,
        "samples": SAMPLES,
        "epochs": EPOCHS,
        "batch": ADAPTER_BATCH,
        "rank": RANK,
        "alpha": ALPHA,
    }
    say(f"adapted {metrics['adapted']} % in {seconds:.0f} s")
    return metrics


def load(directory: Path, device: str) -> tuple[Model, PreTrainedTokenizerFast]:
    """A saved base as float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.to(device), AutoTokenizer.from_pretrained(directory)


def _start_process() -> None:
    # One thread each: the matrices are too small to share, and the sum's order must not depend on the machine.
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _move(batch: tuple[Tensor, Tensor], model: Model) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    return batch[0].to(device), batch[1].to(device)


def _extended(pair: str, side: str) -> bool:
    return pair == "llama" and side == "new"


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    tokenizer.save_pretrained(directory)
    # Recent releases write the name of an internal class; this one is read by every release.
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _say(prefix: str) -> Callable[[str], None]:
    return lambda message: print(f"{prefix}: {message}", file=sys.stderr, flush=True)


def main() -> None:
    """Make the chosen part and keep the rest of ``metrics.json``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo.train", description=__doc__.split("\n")[0])
    parser.add_argument("--pair", choices=[*zoo.PAIRS, "all"], default="all")
    parser.add_argument("--stage", choices=["bases", "adapters", "all"], default="all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=zoo.MODELS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2, help="runs side by side, each with one thread")
    options = parser.parse_args()
    pairs = zoo.PAIRS if options.pair == "all" else (options.pair,)
    # New models first: they are the longer runs.
    bases = [(pair, side) for side in ("new", "old") for pair in pairs]
    made: list[tuple[tuple[str, ...], Metrics]] = []
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn"), _start_process) as pool:
        common = (options.output, options.seed, options.device)
        if options.stage != "adapters":
            jobs = {(pair, side): pool.submit(make_base, pair, side, *common) for pair, side in bases}
            made += [((pair, "bases", side), job.result()) for (pair, side), job in jobs.items()]
        if options.stage != "bases":
            runs = {
                (pair, task, side): pool.submit(make_adapter, pair, side, task, *common)
                for pair, side in bases
                for task in lists.TASKS
            }
            made += [((pair, "tasks", task, side), run.result()) for (pair, task, side), run in runs.items()]
    path = options.output / "metrics.json"
    metrics: Metrics = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for keys, found in made:
        place = metrics
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = found
    path.write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
