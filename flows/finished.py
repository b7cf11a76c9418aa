"""Whether a migration is done already: its output is there, whole, and made of the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from artifacts import default_home
from flows.context import ready_adapter
from lorasuite.adapters import WEIGHTS
from lorasuite.bases import Checkpoint, resolve
from lorasuite.errors import LoRASuiteError
from lorasuite.planning import MigrationConfig
from lorasuite.reporting import RECORD, MigrationRecord
from tasks.fingerprints import fingerprint_adapter, fingerprint_bases, fingerprint_migration


def finished_record(config: MigrationConfig, bases: Mapping[str, str] | None = None) -> MigrationRecord | None:
    """The record in the output directory, where it is that of this migration and its adapter is the one it names.

    Args:
        bases: fingerprints of the bases and their tokenizers, where they are known.

    Raises:
        LoRASuiteError: if the inputs cannot be read.
    """
    output = Path(config.output)
    try:
        record = MigrationRecord.read(output / RECORD)
        record.check_weights(output / WEIGHTS)
    except (LoRASuiteError, OSError):
        return None
    if bases is None:
        bases = fingerprint_bases.fn(default_home(), resolve(config.old_base), resolve(config.new_base))
    folder = ready_adapter(config.adapter, Checkpoint(config.old_base), bases["old_model"], config.allow_pickle)
    adapter = {"adapter": fingerprint_adapter(folder, config.allow_pickle)}
    return record if record.key == fingerprint_migration(config, {**bases, **adapter}) else None


def finished(config: MigrationConfig) -> dict[str, Any] | None:
    """What :func:`flows.migrate_adapter.migrate_adapter` returned when it made what is in the output directory.

    None where there is nothing, or another migration's output, or where the inputs cannot be read. The verdict is that
    of today's gate.
    """
    try:
        record = finished_record(config)
    except LoRASuiteError:
        return None
    if record is None:
        return None
    verdict = record.judge(config.gate).model_dump(mode="json")
    return {**record.to_json(), "verdict": verdict, "output": config.output, "done_before": True}
