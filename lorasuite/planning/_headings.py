"""The headings that settings stand under, in ``--help`` and in a drafted configuration: what everyone needs first."""

from __future__ import annotations

#: Settings that everyone needs, without a heading.
FIRST = (
    "adapter", "old_base", "new_base", "output", "train_data", "eval_data", "calibration", "prompts", "describe",
    "method", "device",
)  # fmt: skip
#: Heading → the settings under it, or the name of nested ones.
HEADINGS: dict[str, tuple[str, ...]] = {
    "The new adapter": ("rank", "energy", "output_type", "unmapped"),
    "Rows and what is measured": (
        "columns", "skip_refused_rows", "template", "finetune_samples", "teacher_samples", "prompt_sources",
        "eval_tasks", "eval_dir", "include_path", "controls", "seed",
    ),
    "Choosing": ("candidates", "effort", "learning_rates", "starts"),
    "Reading models and adapters": ("trust_remote_code", "allow_pickle", "architectures", "loading"),
    "Comparing the two bases": ("pair",),
    "Fine-tune": ("rehearsal", "second_step", "second_step_epochs", "second_step_rate", "finetune"),
    "Teacher: rows that the old base with the adapter writes": ("teacher",),
    "Evaluation": ("evaluation",),
    "General ability": ("general_texts", "general_task", "general"),
    "Verdict": ("serving_gguf", "gate"),
}  # fmt: skip


def heading_of(name: str) -> str | None:
    """The heading of a setting of a migration, or of nested ones; None: it is one that everyone needs."""
    return next((heading for heading, names in HEADINGS.items() if name in names), None)
