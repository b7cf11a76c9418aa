"""The data of an experiment's tasks, read when it is needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flows.context import Context
from flows.measure import Asked
from lorasuite import zoo
from lorasuite.bases import load_tokenizer
from lorasuite.data import Row, Template, calibration_texts, read_rows, templated
from lorasuite.evaluation import check_tasks
from lorasuite.planning import Cell, ExperimentTask

#: Calibration texts and training rows of a miniature pair; every experiment draws from the same ones.
ZOO_TEXTS, ZOO_ROWS = 256, 10_000


@dataclass
class TaskData:
    """A task's files, read when they are needed."""

    config: ExperimentTask
    new_base: Path
    trust: bool
    template: Template

    @cached_property
    def train(self) -> list[Row]:
        """Rows to train on, and those whose prompts the teacher answers."""
        return templated(read_rows(str(self.config.train_data), self.config.columns), self.template)

    @cached_property
    def held_out(self) -> list[Row]:
        """Rows to evaluate on; none where the task is measured by lm-eval tasks."""
        source = self.config.eval_data
        return templated(read_rows(source, self.config.columns), self.template) if source else []

    @cached_property
    def texts(self) -> list[str]:
        """Calibration texts, conversations rendered by the new base's template."""
        reader = load_tokenizer(self.new_base, self.trust)
        source = str(self.config.calibration or self.config.train_data)
        return calibration_texts(source, reader, self.config.columns, template=self.template)

    def asked(self, context: Context, cell: Cell) -> Asked:
        """What an arm of a cell is measured on."""
        options = cell.settings.migration.evaluation
        folders = (self.config.eval_dir, self.config.include_path)
        eval_dir, include_path = (None if folder is None else Path(folder) for folder in folders)
        if not self.held_out:
            check_tasks(self.config.eval_tasks, eval_dir, include_path, self.trust)
        return Asked.of(context, options, self.held_out, self.config.eval_tasks, eval_dir, include_path)


def miniature(pair: str | None, task: ExperimentTask, folder: Path) -> ExperimentTask:
    """A miniature task with its data written to files; any other task as it is."""
    if pair is None or task.zoo is None:
        return task
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.jsonl" for name in ("train_data", "eval_data", "calibration")}
    zoo.write_rows(zoo.rows(pair, task.zoo, "train", ZOO_ROWS), files["train_data"])
    zoo.write_rows(zoo.rows(pair, task.zoo, "test", task.eval_rows), files["eval_data"])
    zoo.write_rows([{"text": text} for text in zoo.texts(pair, ZOO_TEXTS)], files["calibration"])
    return task.model_copy(update={name: str(path) for name, path in files.items()})
