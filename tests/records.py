"""A migration's record, small and complete, for tests of what is made from it."""

from __future__ import annotations

from typing import Any

from lorasuite.evaluation import EvaluationSummary, Gate, TaskSummary, compare
from lorasuite.reporting import ArmResults, MigrationRecord

#: Text that a page must not take for markup.
NASTY = 'say <script>alert("x")</script> & go'


def samples(right: range, n: int = 200) -> list[dict[str, Any]]:
    """Held-out samples of which the rows in ``right`` are answered rightly."""
    return [
        {
            "index": i,
            "prompt": f"{NASTY} {i}",
            "target": f"t{i}",
            "output": f"t{i}" if i in right else "<b>no</b>",
            "exact_match": i in right,
            "loglikelihood": -0.1 if i in right else -9.0,
            "bytes": 4,
        }
        for i in range(n)
    ]


def scored(value: float | None = None, bits: float | None = None, n: int = 200) -> EvaluationSummary:
    """Results on held-out rows, by their exact match or by bits per byte."""
    bits = 2 * (1 - (value or 0.0)) + 0.01 if bits is None else bits
    return EvaluationSummary(
        exact_match=value, exact_match_stderr=None if value is None else 0.02, loss=bits * 2, loss_stderr=0.05,
        perplexity=9.0, bits_per_byte=bits, bits_per_byte_stderr=0.03, n=n, batch_size=16, seconds=1.0, task={},
    )  # fmt: skip


def task_score(task: str, metrics: dict[str, float], **fields: Any) -> TaskSummary:
    """Scores of a task."""
    settings: dict[str, Any] = {"num_fewshot": 0, "version": "1", "batch_size": 16, "limit": None, "seed": 1,
                                "generation": None, "n": 100, "stderr": {}}  # fmt: skip
    return TaskSummary.model_validate({"task": task, "metrics": metrics, **settings, **fields})


def boolq(value: float) -> dict[str, TaskSummary]:
    """Scores of the task boolq alone."""
    return {"boolq": task_score("boolq", {"acc,none": value}, stderr={"acc,none": 0.02})}


def record(**changes: Any) -> MigrationRecord:
    """A migration by ``auto`` with fine-tuning, control, evaluation and tasks."""
    return MigrationRecord.model_validate(content(**changes))


def content(**changes: Any) -> dict[str, Any]:
    """The same as ``migration.json`` keeps it, without its schema version."""
    arms = {"old+adapter": range(198), "new": range(10), "migrated+lft": range(8, 188)}
    kept = {arm: samples(right) for arm, right in arms.items()}
    comparisons = [
        compare(kept[arm], kept["migrated+lft"], names=(arm, "migrated+lft")) for arm in ("old+adapter", "new")
    ]
    evaluation = {
        "old": scored(0.0), "old+adapter": scored(0.99), "new": scored(0.05), "migrated": scored(0.1),
        "scratch": scored(0.8), "migrated+lft": scored(0.9),
    }  # fmt: skip
    tasks = {"old+adapter": boolq(0.75), "new": boolq(0.5), "migrated+lft": boolq(0.7)}
    results = ArmResults.model_validate({"evaluation": evaluation, "tasks": tasks, "comparisons": comparisons})
    gate = Gate(lower_bound=True, min_gain_over_bare=0.1, max_negative_flips=0.2)
    losses = [{"step": i, "loss": 5.0 / i, "learning_rate": 1e-2} for i in range(1, 29)]
    run = {
        "samples": 100, "steps": 28, "learning_rate": 1e-2, "losses": losses, "validation": [], "validation_loss": None,
        "seconds": 3.0, "peak_memory_bytes": 2**29, "dropped": 0, "rehearsed": 0, "distilled": 0,
        "trainable_parameters": 64, "precision": "fp32", "resumed_from": None, "micro_batch_size": 16,
        "sweep": [
            {"learning_rate": 3e-3, "validation_loss": 0.8, "epochs": 3, "start_loss": 4.0},
            {"learning_rate": 1e-2, "validation_loss": None, "epochs": None, "start_loss": None},
        ],
    }  # fmt: skip
    stages = [("vocabulary", None, True), ("alignment", "mlp", False), ("finetune", "migrated", False)]
    path = "model.layers.{}.self_attn.{}"
    found: dict[str, Any] = {
        "old_base": {"id": "org/old", "name": "org/old", "revision": "a" * 40, "fingerprint": "1" * 64},
        "new_base": {"id": "org/new", "name": "org/new", "revision": "b" * 40, "fingerprint": "2" * 64},
        "adapter": {
            "id": "org/mirror", "name": "mirror", "kind": "LORA", "fingerprint": "3" * 64, "rank": 8, "modules": 4,
        },
        "method": "functional",
        "candidates": [
            {"method": "functional", "scale": 1.0, "loss": 4.35},
            {"method": "none", "scale": 0.0, "loss": 4.54},
            {"method": "lorasuite", "scale": 1.0, "loss": None},
        ],
        "layer_map": {"0": 0, "1": 2},
        "layer_similarity": {"0": 0.8, "1": 0.9},
        "head_map": {"0->0": {"0": 1, "1": 0}, "1->2": {"0": 0, "1": 1}},
        "head_similarity": {"0": 0.5, "1": 0.25},
        "transfer_matrix": {"identity": False, "residual": 0.43, "tokens": 114},
        "alignment": {"rows": 512, "residual": {"0": {"q in": 0.2, "o out": 0.4}, "1": {"q in": 0.1, "o out": 0.3}}},
        "updates": {path.format(n, role): 1.5 for n in (0, 2) for role in ("q_proj", "o_proj")},
        "retained_energy": {path.format(n, role): 0.9 for n in (0, 2) for role in ("q_proj", "o_proj")},
        "dropped": [{"module": "model.layers.1.mlp.gate", "why": "the new base has no gate projection"}],
        "prompts": None, "fresh": [], "carried": [], "rank": 8, "loaded_bytes_peak": 1, "fit_residual": {},
        "finetune": {**run, "start": "functional", "starts": {"functional": 0.7, "fresh": 0.8}, "screened": {}},
        "control": {**run, "losses": [{**p, "loss": p["loss"] * 1.2} for p in losses]},
        **results.model_dump(mode="json"),
        "teacher": None,
        "verdict": results.model_copy(update={"tasks": {}}).judge(gate).model_dump(mode="json"),
        "serving": {
            "peft": {"ok": True, "problems": [], "notes": ["it changes logits"], "ran": True, "not_run": None},
            "vllm": {"ok": False, "problems": ["DoRA is not supported"], "notes": [], "ran": False, "not_run": None},
        },
        "timings": [
            {
                "stage": stage, "label": label, "cached": cached, "seconds": 0.5, "computed_seconds": 3.0,
                "peak_memory_bytes": 2**29, "key": "k",
            }
            for stage, label, cached in stages
        ],
        "peak_memory_bytes": {"finetune": 2**29},
        "notices": ["the chat template differs"],
        "seed": 42,
        "versions": {"lorasuite": "0.1.0", "torch": "2.13.0"},
        "weights_sha256": "ab" * 32, "algorithm_version": 1,
        "settings": {"gate": gate.model_dump(mode="json"), "eval_data": "data/test.jsonl",
                     "pair": {"similarity": "cka"}},
        "key": "k",
        "command": "lorasuite migrate --adapter org/mirror",
    }  # fmt: skip
    return found | changes
