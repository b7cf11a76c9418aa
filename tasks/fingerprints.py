"""Fingerprints of a migration's inputs: what every later key is made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from artifacts import SideFile
from lorasuite import ALGORITHM_VERSION
from lorasuite.adapters import Adapter, sources, tokenizer_digest
from lorasuite.bases import (
    check_finite,
    digest_json,
    file_digest,
    fingerprint_model,
    fingerprint_tokenizer,
    resolve,
)
from lorasuite.data import HUB, read_template, source_digest
from lorasuite.errors import AdapterError, DataError, Problem
from lorasuite.evaluation.eval_tasks import TASKS, expand
from lorasuite.evaluation.eval_tasks import fingerprint as fingerprint_own
from lorasuite.planning import MigrationConfig
from lorasuite.teacher import card_texts
from tasks.recording import run_log
from tasks.unchanged import folder_files

#: sha256 by path and stamp: checkpoints of many gigabytes are not read again for every adapter.
MEMORY = "fingerprints.json"

#: Settings of a migration that name data.
DATA_FILES = (
    "calibration", "train_data", "prompts", "eval_data", "general_texts", "include_path", "serving_gguf",
)  # fmt: skip
#: What a PEFT adapter consists of.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@task(name="fingerprint", cache_policy=NO_CACHE, persist_result=False)
def fingerprint_bases(home: Path, old_base: Path, new_base: Path) -> dict[str, str]:
    """Fingerprints of both models and tokenizers, and a look at every weight that was not seen before.

    Raises:
        CheckpointError: if a weight holds NaN or Inf.
    """
    memory = SideFile(home / MEMORY, run_log().warning)
    known: dict[str, str] = memory.read()
    seen = dict(known)
    check_finite(old_base, known)
    check_finite(new_base, known)
    found = {
        "old_model": fingerprint_model(old_base, known),
        "new_model": fingerprint_model(new_base, known),
        "old_tokenizer": fingerprint_tokenizer(old_base, known),
        "new_tokenizer": fingerprint_tokenizer(new_base, known),
    }
    if known != seen:
        try:
            memory.update({name: digest for name, digest in known.items() if name not in seen})
        except OSError as error:
            run_log().warning("files are read again next time: %s cannot be written (%s)", memory.path, error)
    return found


def fingerprint_adapter(path: Path, allow_pickle: bool = False) -> str:
    """What the adapter computes."""
    return Adapter.open(path, allow_pickle).fingerprint()


def fingerprint_any_adapter(path: Path, allow_pickle: bool = False) -> str:
    """As :func:`fingerprint_adapter`; of kinds that PEFT loads and migration does not know, the files."""
    try:
        return fingerprint_adapter(path, allow_pickle)
    except AdapterError:
        return digest_json({name: file_digest(path / name) for name in ADAPTER_FILES if (path / name).is_file()})


def fingerprint_folder(path: Path) -> str:
    """Every file below a directory, by its place in it and its content."""
    return digest_json({str(file.relative_to(path)): file_digest(file) for file in folder_files(path)})


def fingerprint_task(task: str, eval_dir: Path | None, include_path: Path | None) -> str:
    """What an lm-eval task asks: its files and local rows; lm-eval's own tasks go by their names.

    Raises:
        DataError: if ``eval_dir`` lacks the task's rows.
    """
    if task in TASKS:
        return fingerprint_own(task, eval_dir)
    if Path(task).is_file():
        return fingerprint_folder(Path(task).parent)
    return digest_json([task, None if include_path is None else fingerprint_folder(include_path)])


def fingerprint_migration(config: MigrationConfig, fingerprints: Mapping[str, str]) -> str:
    """What a whole migration computes: its inputs by content, its settings where they are not the defaults.

    Args:
        fingerprints: of the bases, their tokenizers and the adapter, by name. What lies beside the adapter is read
            here: a tokenizer of its own, and its card where prompts may come from it.

    Raises:
        DataError: if a data file cannot be read.
    """
    elsewhere = {"adapter", "old_base", "new_base", "output", "device", "gate", "eval_dir", "template", *DATA_FILES}
    template = read_template(config.template)
    data = {} if template.default else {"template": digest_json(template.text)}
    for name in DATA_FILES:
        source = getattr(config, name)
        if source is not None:
            data[name] = fingerprint_source(source)
    folders = [resolve(source) for source in sources(config.adapter)]
    for number, folder in enumerate(folders):
        if (digest := tokenizer_digest(folder)) is not None:
            data[f"tokenizer of adapter {number}"] = digest
    if config.may_read_card and len(folders) == 1 and any(card := card_texts(folders[0])):
        data["card"] = digest_json(list(card))
    for name in expand(config.every_task):
        data[f"task {name}"] = fingerprint_task(name, *config.task_folders)
    settings = config.model_dump(mode="json", exclude=elsewhere, exclude_defaults=True)
    return digest_json({"version": ALGORITHM_VERSION, "inputs": dict(fingerprints), "data": data, "settings": settings})


def fingerprint_source(source: str) -> str:
    """The content of a data file, a folder, or a data set of the Hub.

    Raises:
        DataError: if it cannot be read.
    """
    if source.startswith(HUB):
        return source_digest(source)
    path = Path(source)
    return fingerprint_folder(path) if path.is_dir() else fingerprint_file(path)


def fingerprint_file(path: Path) -> str:
    """A file's content.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        return file_digest(path)
    except OSError as error:
        raise DataError(Problem(str(path), f"cannot be read ({error})", "Check the path.")) from None
