"""Computing an artifact again from what its manifest says made it: to repair it, or to compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts import Manifest, Store
from lorasuite.errors import ConfigError, InputChanged, Problem

if TYPE_CHECKING:
    from tasks.stage import Stage, Where

#: Name in ``manifest.run`` of what made an artifact: the stage's inputs, and where it ran.
MADE_BY = "made_by"

#: Results that say how a computation went, and not what came out.
_WENT = {"seconds", "peak_memory_bytes"}
_NEXT = "The next run that needs it computes it."


def made_by(inputs: dict[str, Any], where: Where) -> dict[str, Any]:
    """What :func:`rebuild` needs beside the manifest's settings."""
    return {"inputs": inputs, "where": where.model_dump(mode="json", exclude={"home", "remote", "halvings"})}


def rebuild(stage: Stage, manifest: Manifest, store: Store, into: Store, work: Path) -> Manifest:
    """Compute an artifact again.

    Args:
        store: has the artifacts that it was made from.
        into: where it is put; may be the same store, where the one that is there is damaged.
        work: directory for what the stage keeps while it runs.

    Raises:
        ConfigError: if the manifest does not say what made it, or another version of the stage did.
        InputChanged: if a directory it was made from is not what it was.
        ArtifactMissing, ArtifactDamaged: if an artifact it was made from cannot be used.
    """
    from tasks.stage import WORK, Where

    told = manifest.run.get(MADE_BY)
    if told is None:
        raise ConfigError(Problem(f"artifact {manifest.key}", "its manifest does not say what made it", _NEXT))
    if stage.version != manifest.version:
        what = f"version {manifest.version} of {stage.name} made it, and this is version {stage.version}"
        raise ConfigError(Problem(f"artifact {manifest.key}", what, _NEXT))
    given = told["where"]
    paths = given["paths"] | ({WORK: str(work)} if WORK in given["paths"] else {})
    where = Where.model_validate({**given, "paths": paths, "home": store.home, "remote": None})
    try:
        where.check_unchanged()
    except InputChanged as error:
        what = "is not what it was when the artifact was made"
        raise InputChanged([Problem(problem.where, what, _NEXT) for problem in error.problems]) from None
    return stage.make(told["inputs"], manifest.settings, where, store, into)


def differences(one: Manifest, other: Manifest) -> list[str]:
    """What two computations of one artifact do not have in common: names of files and of results."""
    files = {name for name in one.files.keys() | other.files.keys() if one.files.get(name) != other.files.get(name)}
    if one.digest == other.digest:
        files = {name for name in files if name.startswith("files/")}
    names = (one.info.keys() | other.info.keys()) - _WENT
    results = {name for name in names if one.info.get(name) != other.info.get(name)}
    return sorted(files) + sorted(results)
