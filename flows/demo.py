"""The demo: one real, tiny adapter from one real, tiny base to another, with every control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasuite import zoo
from lorasuite.errors import ConfigError, OutputError, Problem, did_you_mean

#: Learning rates tried for the migrated adapter and for the control alike.
LEARNING_RATES = [3e-3, 1e-2]
SAMPLES = 100
#: The paper's 3 epochs (21 steps) teach the miniature bases nothing from 100 rows, whatever the start.
EPOCHS = 12
HELD_OUT = 200
TEXTS = 256


def run_demo(
    output: Path, pair_name: str = "llama", task: str | None = None, samples: int = SAMPLES, written: int = 0
) -> dict[str, Any]:
    """Write the data beside the output, migrate, and return the content of ``migration.json``.

    Args:
        samples: labelled rows of the fine-tune; 0: none.
        written: rows that the old base with the adapter writes besides, prompts too.

    Raises:
        ConfigError: for a pair or task the zoo does not have.
        OutputError: if the output directory exists.
    """
    if pair_name not in zoo.PAIRS:
        raise ConfigError(Problem("--pair", f"no pair {pair_name!r}", did_you_mean(pair_name, zoo.PAIRS)))
    pair = zoo.pair(pair_name)
    if task is not None and task not in pair.tasks:
        raise ConfigError(Problem("--task", f"no task {task!r}", did_you_mean(task, pair.tasks)))
    chosen = task or pair.tasks[0]
    if output.exists():
        raise OutputError(Problem(str(output), "exists already", "Remove it, or give another --output."))
    data = output / "data"
    data.mkdir(parents=True)
    labelled: dict[str, Any] = {}
    if samples:
        zoo.write_rows(zoo.rows(pair_name, chosen, "train", samples), data / "train.jsonl")
        labelled = {"train_data": str(data / "train.jsonl"), "finetune_samples": samples}
    # All prompts of a task begin with its name: enough for the old base to write others.
    frame = {"prefix": f"{chosen} :", "suffix": " ="}
    zoo.write_rows(zoo.rows(pair_name, chosen, "test", HELD_OUT), data / "test.jsonl")
    zoo.write_rows([{"text": text} for text in zoo.texts(pair_name, TEXTS)], data / "texts.jsonl")
    from flows.migrate_adapter import migrate_adapter

    return migrate_adapter(
        {
            "adapter": str(pair.adapter(chosen)),
            "old_base": str(pair.old),
            "new_base": str(pair.new),
            "output": str(output / "adapter"),
            "calibration": str(data / "texts.jsonl"),
            "eval_data": str(data / "test.jsonl"),
            **labelled,
            "teacher_samples": samples + written if written else 0,
            "teacher": {"max_new_tokens": 24, "imitate": bool(written), **(frame if written else {})},
            "candidates": ["all"],
            "learning_rates": LEARNING_RATES,
            "finetune": {"epochs": EPOCHS, "batch_size": 16},
        }
    )
