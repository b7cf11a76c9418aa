"""The paper's fifteen tasks as lm-eval task files, in the format of LLM-Adapters (arXiv 2304.01933).

The YAML files beside this module are what lm-eval reads, here or with ``lm_eval --include_path``; this module knows
their names, and what a result on one of them depends on. Where their data comes from: :mod:`.sources`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lorasuite.bases import digest_json, file_digest
from lorasuite.data import CONTEXT_TEMPLATE, INSTRUCTION_TEMPLATE
from lorasuite.evaluation import _answers as answers
from lorasuite.evaluation.eval_tasks import sources
from lorasuite.evaluation.eval_tasks.sources import DATA_FILE

#: Where the task files are.
TASK_FILES = Path(__file__).parent
#: With which the names of the paper's tasks begin.
PREFIX = "lorasuite_"

#: The paper's two groups of tasks (its average is the plain mean over a group's tasks).
GROUPS = {
    "lorasuite_math": ("addsub", "multiarith", "singleeq", "gsm8k", "aqua", "mawps", "svamp"),
    "lorasuite_commonsense": (
        "boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
    ),
}  # fmt: skip
GROUPS = {group: tuple(PREFIX + name for name in names) for group, names in GROUPS.items()}
TASKS = tuple(task for tasks in GROUPS.values() for task in tasks)


def expand(names: Sequence[str]) -> list[str]:
    """The names with the paper's groups replaced by their tasks, each name once."""
    return list(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))


def source(task: str) -> dict[str, Any]:
    """``dataset_kwargs`` of one of :data:`TASKS`: folder, kind, choices and Hub data set."""

    class Loader(yaml.SafeLoader):
        """Leaves ``!function`` alone."""

    Loader.add_constructor("!function", lambda loader, node: None)
    values = yaml.load((TASK_FILES / f"{task}.yaml").read_text(encoding="utf-8"), Loader)
    return dict(values["dataset_kwargs"])


def data_file(task: str, eval_dir: Path) -> Path:
    """Where a task's rows are in a directory laid out as LLM-Adapters' ``dataset/``."""
    return eval_dir / str(source(task)["folder"]) / DATA_FILE


def fingerprint(task: str, eval_dir: Path | None) -> str:
    """What decides a task's documents and scores: its files, the rendering, the extraction, and its local rows.

    Rows from the Hub count by the data set's name and revision.

    Raises:
        DataError: if there is no such file in ``eval_dir``.
    """
    files = [*TASK_FILES.glob("_*_yaml"), TASK_FILES / f"{task}.yaml"]
    code = [inspect.getsource(module) for module in (answers, sources)]
    rows = None
    if eval_dir is not None:
        file = data_file(task, eval_dir)
        sources.check_file(file)
        rows = file_digest(file)
    return digest_json(
        {
            "files": {file.name: file_digest(file) for file in sorted(files)},
            "code": code,
            "prompt": [CONTEXT_TEMPLATE, INSTRUCTION_TEMPLATE],
            "rows": rows,
        }
    )
