"""Artifacts that are damaged, made whole again; and one computed again to compare."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from artifacts import ArtifactDamaged, ArtifactError, ArtifactMissing, Manifest, Store, default_remote, open_store
from flows.context import STAGES
from lorasuite.errors import ConfigError, LoRASuiteError, Problem
from tasks.rebuilding import differences, rebuild


def repair(damaged: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Fetch each damaged artifact from the shared store, or compute it again.

    Args:
        damaged: key to what is wrong.

    Returns:
        key to how it was repaired, and key to why it could not be.
    """
    store, left = open_store(remote=default_remote()), dict(damaged)
    repaired: dict[str, str] = {}
    while left:
        before = len(left)
        for key in list(left):
            try:
                repaired[key] = _repaired(store, key)
                del left[key]
            except (LoRASuiteError, ArtifactError) as error:
                left[key] = f"{damaged[key]} It cannot be repaired: {error}"
        if len(left) == before:  # what one is made from may be damaged itself, and be repaired in the next round
            break
    return repaired, left


def _repaired(store: Store, key: str) -> str:
    try:
        store.open(key)
        return f"fetched from {default_remote()}"
    except (ArtifactDamaged, ArtifactMissing):
        manifest = store.manifest(key)
    with tempfile.TemporaryDirectory() as folder:
        made = _rebuilt(store, manifest, store, Path(folder))
    return "computed again" if not differences(manifest, made) else "computed again, and it comes out otherwise"


def check(key: str) -> tuple[str, list[str]]:
    """Compute an artifact again, and compare.

    Returns:
        its stage, and the names of what comes out otherwise.

    Raises:
        ConfigError, InputChanged: if it cannot be computed from what its manifest says.
        ArtifactMissing, ArtifactDamaged: if it, or what it is made from, cannot be used.
    """
    store = open_store(remote=default_remote())
    manifest = store.open(key).manifest
    with tempfile.TemporaryDirectory(dir=store.home, prefix="check-") as folder:
        made = _rebuilt(store, manifest, Store(Path(folder) / "home"), Path(folder) / "work")
    return manifest.stage, differences(manifest, made)


def _rebuilt(store: Store, manifest: Manifest, into: Store, work: Path) -> Manifest:
    if manifest.stage not in STAGES:
        what = f"{manifest.stage} is kept as it was read, and no stage computes it"
        raise ConfigError(Problem(f"artifact {manifest.key}", what, "The next run that needs it reads it again."))
    return rebuild(STAGES[manifest.stage], manifest, store, into, work)
