"""What a fine-tune forgets, with and without texts of the base's own beside its rows.

    python benchmarks/rehearsal.py --adapter DIR --old-base DIR --new-base DIR --prompts FILE --test FILE \
        --texts FILE --output DIR [--shares 0 0.0625] [--seeds 0 1] [--learning-rate 1e-3] [--epochs 3]

The old base with the adapter answers the prompts; a fresh LoRA of the new base, of the old one's rank on every
projection, is trained on the answers, with a share of texts as many as rows; then exact match and loss on the test
rows, and what the LoRA costs the new base on the texts (``--texts``, which nothing is trained on), beside what the old
adapter costs the old one. A line of JSON for each run in ``results.jsonl``; runs that are there are not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

from lorasuite.adapters import Adapter, attached, fresh_config, untrained
from lorasuite.bases import Checkpoint, load_model, load_tokenizer
from lorasuite.data import Row, read_prompts, read_rows, rows_to_jsonl
from lorasuite.evaluation import EvaluationSettings, GeneralSettings, evaluate, evaluate_text, held_out_texts
from lorasuite.teacher import TeacherSettings, own_texts, write_rows
from lorasuite.training import OWN_TEXTS, OWN_TOKENS, FinetuneSettings, finetune, rehearsed


def written_rows(arguments: argparse.Namespace) -> list[Row]:
    """What the old base with the adapter answers, written once."""
    file = arguments.output / "rows.jsonl"
    if not file.is_file():
        prompts = read_prompts(arguments.prompts)
        base, tokenizer = load_model(arguments.old_base), load_tokenizer(arguments.old_base)
        settings = TeacherSettings(max_new_tokens=96, batch_size=64)
        with attached(base, arguments.adapter, "cpu") as teacher:
            found = write_rows(teacher, tokenizer, prompts, len(prompts), settings, seed=0)
        file.write_bytes(rows_to_jsonl(found.rows))
    return read_rows(file)


def main() -> None:
    """Run what is missing, print every line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("adapter", "old-base", "new-base", "prompts", "test", "texts", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.0625])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=float, default=3)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows, test = written_rows(arguments), read_rows(arguments.test)
    given = [json.loads(line)["text"] for line in arguments.texts.read_text(encoding="utf-8").splitlines()]
    texts, _ = held_out_texts(given, [], GeneralSettings())
    results = arguments.output / "results.jsonl"
    lines = results.read_text().splitlines() if results.is_file() else []
    known = {(line["share"], line["seed"]) for line in map(json.loads, lines)}

    def keep(line: dict[str, object]) -> None:
        print(json.dumps(line), flush=True)
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")

    if not lines:
        adapters = {"bare": None, "with": arguments.adapter}
        old = evaluate_text(str(arguments.old_base), load_tokenizer(arguments.old_base), texts, adapters=adapters)
        keep({"share": None, "seed": None, "general": old["with"].bits_per_byte - old["bare"].bits_per_byte})
    model, tokenizer = load_model(arguments.new_base), load_tokenizer(arguments.new_base)
    bare = evaluate_text(model, tokenizer, texts, adapters={"bare": None})["bare"].bits_per_byte
    like = Adapter.open(arguments.adapter)
    roles = like.roles(Checkpoint(arguments.old_base).architecture)
    architecture = Checkpoint(arguments.new_base).architecture
    lora = untrained(roles, architecture, kind="lora", rank=like.rank, scaling=2.0, steps=0)
    for seed, share in itertools.product(arguments.seeds, arguments.shares):
        if (share, seed) in known:
            continue
        own = own_texts(model, tokenizer, OWN_TEXTS, OWN_TOKENS, seed=seed) if share else []
        output = arguments.output / f"share-{share:g}-seed-{seed}"
        settings = FinetuneSettings(learning_rate=arguments.learning_rate, epochs=arguments.epochs, seed=seed)
        begun = time.perf_counter()
        result = finetune(
            model, tokenizer, rows, settings, adapter=None, lora=fresh_config(lora), output=output,
            work_dir=arguments.output / "work", rehearsal=rehearsed(own, share, len(rows)),
        )  # fmt: skip
        seconds = time.perf_counter() - begun
        found = evaluate(model, tokenizer, test, EvaluationSettings(), adapters={"with": output})["with"]
        general = evaluate_text(model, tokenizer, texts, adapters={"with": output})["with"].bits_per_byte - bare
        keep(
            {
                "share": share,
                "seed": seed,
                "texts": result.rehearsed,
                "steps": result.steps,
                "seconds": round(seconds),
                "exact_match": found.exact_match,
                "loss": round(found.loss, 4),
                "general": round(general, 4),
            }
        )


if __name__ == "__main__":
    main()
