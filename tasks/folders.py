"""PEFT directories as the files of artifacts."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from artifacts import Artifact
from lorasuite.adapters import CONFIG, WEIGHTS, Adapter, LowRank, write_adapter
from lorasuite.bases import Checkpoint
from tasks.stage import Where

#: Written into stored adapters, which must not depend on where the base lies; publishing puts the real name.
ANY_BASE = "base"


def adapter_folder(artifact: Artifact) -> Path:
    """The PEFT directory kept in an artifact of a transform or a fine-tune."""
    return artifact.file(CONFIG).parent


def weights_digest(artifact: Artifact) -> str:
    """sha256 of the weight file of a stored adapter."""
    return artifact.manifest.files[f"files/{WEIGHTS}"].sha256


def adapter_path(adapter: Artifact | str, where: Where) -> Path:
    """Where an adapter lies: in its artifact, or, given by its fingerprint, at the path ``adapter``."""
    return adapter_folder(adapter) if isinstance(adapter, Artifact) else where.path("adapter")


def open_adapter(adapter: Artifact | str, where: Where) -> Adapter:
    """An adapter of the old base, read lazily."""
    return Adapter.open(adapter_path(adapter, where), bool(where.options.get("allow_pickle")))


def folder_files(folder: Path) -> dict[str, Path | bytes]:
    """The files of a directory by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def adapter_files(
    adapter: Adapter, new: Checkpoint, updates: Mapping[str, LowRank], rank: int, output_type: Any, **beside: Any
) -> dict[str, Path | bytes]:
    """The files of a PEFT adapter of these updates, with the scaling the old one was trained with.

    Args:
        beside: further arguments of :func:`lorasuite.adapters.write_adapter`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = write_adapter(
            Path(folder),
            updates,
            architecture=new.architecture,
            dims=new.dims,
            base=ANY_BASE,
            output_type=output_type,
            experts=new.expert_count,
            **beside,
            **adapter.lora_settings(rank),
        )
        return folder_files(path)
