"""The output directory of a migration: assembled beside its place, then renamed into it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lorasuite.adapters import CONFIG, WEIGHTS, check_loads
from lorasuite.bases import read_json
from lorasuite.reporting._assembled import assembled
from lorasuite.reporting._card import model_card
from lorasuite.reporting._files import FIGURE_DATA, RECORD
from lorasuite.reporting._record import MigrationRecord
from lorasuite.reporting._report import write_report


def publish(
    output: Path,
    adapter: Path,
    record: MigrationRecord,
    *,
    new_base: Path,
    figures: Mapping[str, Tensor],
    samples: Mapping[str, Path],
    trust_remote_code: bool = False,
) -> Path:
    """Write adapter, record, card and report as one directory that appears only when it is whole.

    Args:
        adapter: PEFT directory; its base model's name is replaced by the new base's id and revision.
        record: the content of ``migration.json``.
        figures: tensors the report draws.
        samples: arm, or arm/task → per-sample evaluation outputs (JSONL).

    Raises:
        OutputError: if the directory exists.
        AdapterError: if PEFT would not find each of the adapter's tensors in the new base, or it is not the adapter
            that the record is of.
    """
    with assembled(output) as scratch:
        shutil.copyfile(adapter / WEIGHTS, scratch / WEIGHTS)
        record.check_weights(scratch / WEIGHTS)
        config = read_json(adapter / CONFIG)
        config["base_model_name_or_path"] = record.new_base.id
        config["revision"] = record.new_base.revision
        config["inference_mode"] = True
        _write(scratch / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        check_loads(scratch, new_base, trust_remote_code)
        record.write(scratch / RECORD)
        _write(scratch / "README.md", model_card(record))
        if figures:
            save_file({name: tensor.contiguous() for name, tensor in figures.items()}, scratch / FIGURE_DATA)
        copy_samples(samples, scratch)
        write_report(scratch)
    return output


def copy_samples(samples: Mapping[str, Path], folder: Path) -> None:
    """Copy per-sample outputs to ``samples/<arm>.jsonl`` and ``samples/<arm>/<task>.jsonl`` in a directory."""
    for name, path in samples.items():
        target = folder / "samples" / f"{name}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        target.chmod(0o600)  # they quote held-out rows


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
