"""Checkpoints of a run in progress: trusted only when complete, and only by the run that wrote them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lorasuite.stored import replace_text
from lorasuite.training._settings import FinetuneSettings

if TYPE_CHECKING:
    from peft import PeftModel


class Digested(Protocol):
    """Something a run depends on."""

    def digest(self) -> str:
        """Hash of all that matters of it."""


logger = logging.getLogger(__name__)

#: Present in a checkpoint only once every other file of it is on disk.
_COMPLETE = "complete.json"
#: Names the run a work directory belongs to, so that a checkpoint of another run is never resumed.
_RUN = "run.json"


def claim_work_dir(
    work_dir: Path,
    settings: FinetuneSettings,
    examples: list[dict[str, list[int]]],
    wrapped: PeftModel,
    taught: Mapping[str, Digested | None],
    stop_after: int | None,
) -> Path | None:
    """Claim a work directory for one run, and remove what is there of any other.

    Args:
        taught: what the loss reads beside the examples, by name.

    Returns:
        the run's last complete checkpoint, or None to start from the beginning.
    """
    run = {
        "key": _run_key(settings, examples, wrapped),
        **{name: known and known.digest() for name, known in taught.items()},
        "stop": stop_after,
    }
    record = work_dir / _RUN
    try:
        same = json.loads(record.read_text(encoding="utf-8")) == run
    except (OSError, ValueError):
        same = False
    if not same:
        for stale in work_dir.glob("checkpoint-*"):
            shutil.rmtree(stale)
        work_dir.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(run), encoding="utf-8")
        return None
    complete: dict[int, Path] = {}
    for checkpoint in work_dir.glob("checkpoint-*"):
        if _is_complete(checkpoint):
            complete[int(checkpoint.name.rpartition("-")[2])] = checkpoint
        else:
            logger.warning("%s was being written when its run was interrupted; it is not used", checkpoint.name)
            shutil.rmtree(checkpoint)
    if not complete:
        return None
    step = max(complete)
    logger.info("fine-tuning goes on from step %d", step)
    return complete[step]


def clear_work_dir(work_dir: Path) -> None:
    """Remove what this module put into a work directory, and the directory where nothing else is in it."""
    for checkpoint in work_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    (work_dir / _RUN).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        work_dir.rmdir()


def _run_key(settings: FinetuneSettings, examples: list[dict[str, list[int]]], wrapped: PeftModel) -> str:
    """Hash of what decides the result: settings, examples, starting adapter, the base's shape, library versions."""
    import peft
    import torch
    import transformers

    digest = hashlib.sha256()
    # How often checkpoints are kept and where losses are logged changes nothing in the result.
    digest.update(settings.model_dump_json(exclude={"checkpoint_steps", "report_to"}).encode())
    digest.update(json.dumps(examples).encode())
    digest.update(f"{torch.__version__} {transformers.__version__} {peft.__version__}".encode())
    for name, parameter in sorted(wrapped.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.requires_grad:
            digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
        else:
            # A sample of each frozen tensor tells bases apart without reading gigabytes.
            digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def mark_complete(checkpoint: Path) -> None:
    """Put every file of a checkpoint on disk, then the mark with their sizes."""
    sizes = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != _COMPLETE):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        sizes[str(file.relative_to(checkpoint))] = file.stat().st_size
    replace_text(checkpoint / _COMPLETE, json.dumps(sizes))


def _is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint carries its mark and every file has the size it was marked with."""
    try:
        sizes = json.loads((checkpoint / _COMPLETE).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False
