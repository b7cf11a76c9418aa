"""Watches directories and the Hub for new base models, and announces each one as an event."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.events import Event
from prefect.events.schemas.events import Resource
from prefect.logging.loggers import get_run_logger

from artifacts import SideFile, default_home
from flows.allowed import Allowed, deployed
from lorasuite.bases import Checkpoint, digest_json
from lorasuite.errors import ConfigError, LoRASuiteError, Problem

EVENT = "lorasuite.base-model.released"

#: What was seen, by source: {model: revision}.
MEMORY = "watch.json"

#: Endings of files that a download or a copy is still writing.
_UNFINISHED = (".incomplete", ".part", ".partial", ".tmp", ".crdownload", ".lock")


@dataclass(frozen=True)
class Seen:
    """A base model at one moment: what to give as ``new_base``, and what changes when it does."""

    model: str
    revision: str


@flow(name="watch-base-models", validate_parameters=False)
def watch_base_models(
    sources: Sequence[str],
    fleet: str | None = None,
    old_base: str | None = None,
    settle_seconds: float = 60,
    announce_first: bool = False,
) -> dict[str, Any]:
    """Look at every source once, announce what is new since the last look, and remember it.

    Args:
        sources: a directory of checkpoints (or one checkpoint), a Hub repository ``org/name``, or an organisation
            ``org/*``.
        fleet: the fleet that a release is to start, by the name it is registered under; carried in the event.
        old_base: only this old base's pairs; carried in the event.
        settle_seconds: a checkpoint whose files changed less than this ago is still being written.
        announce_first: announce what the first look at a source finds, too; by default it is only remembered.

    Returns:
        ``announced`` and ``unfinished`` models by name.

    Raises:
        ConfigError: for a source that is neither a directory nor a Hub name; in a run of a deployment also for a fleet
            that is not registered with its worker.
    """
    if fleet and deployed():
        Allowed.here().fleet(fleet)
    log = get_run_logger()
    memory = SideFile(default_home() / MEMORY, log.warning)
    known: dict[str, dict[str, str]] = memory.read()
    announced: list[str] = []
    unfinished: list[str] = []
    for source in sources:
        name = str(Path(source).expanduser().absolute()) if Path(source).expanduser().is_dir() else source
        first = name not in known
        before = known.setdefault(name, {})
        for seen in _look(source, settle_seconds, unfinished):
            if before.get(seen.model) == seen.revision:
                continue
            if not first or announce_first:
                _announce(seen, fleet, old_base)
                announced.append(seen.model)
                log.info("new base model: %s (%s)", seen.model, seen.revision)
            # remembered only after it was announced: a failure in between announces it again, and never not at all
            before[seen.model] = seen.revision
            memory.update({name: before})
        memory.update({name: before})
    for model in unfinished:
        log.info("%s is still being written, or incomplete", model)
    return {"announced": announced, "unfinished": unfinished}


def _look(source: str, settle_seconds: float, unfinished: list[str]) -> Iterator[Seen]:
    folder = Path(source).expanduser()
    if folder.is_dir():
        here = [folder] if (folder / "config.json").is_file() else sorted(p for p in folder.iterdir() if p.is_dir())
        for checkpoint in here:
            if checkpoint.name.startswith("."):
                continue
            if complete(checkpoint, settle_seconds):
                yield Seen(str(checkpoint.absolute()), _signature(checkpoint))
            else:
                unfinished.append(str(checkpoint))
        return
    if not re.fullmatch(r"[\w.-]+/([\w.-]+|\*)", source) or source.startswith("."):
        raise ConfigError(
            Problem(source, "no such directory, and not a Hub name", "Give a directory, org/name, or org/*.")
        )
    from huggingface_hub import HfApi

    api = HfApi()
    organisation, _, name = source.partition("/")
    ids = (
        [source] if name != "*" else [m.id for m in api.list_models(author=organisation, sort="created_at", limit=100)]
    )
    for model in ids:
        info = api.model_info(model)
        files = {file.rfilename for file in info.siblings or []}
        if "config.json" in files and _whole(files):
            # the revision in the name: what the fleet migrates to is what was seen
            yield Seen(f"{model}@{info.sha}", str(info.sha))
        else:
            unfinished.append(model)


def complete(checkpoint: Path, settle_seconds: float = 0) -> bool:
    """Whether a directory holds a whole base model: configuration, every shard at full length, nothing unfinished."""
    files = [file for file in checkpoint.rglob("*") if file.is_file()]
    if any(file.name.endswith(_UNFINISHED) for file in files):
        return False
    if files and max(file.stat().st_mtime for file in files) > time.time() - settle_seconds:
        return False
    try:
        opened = Checkpoint(checkpoint)
        return not opened.check()  # reads the headers, which name each shard's length
    except (LoRASuiteError, OSError):
        return False


def _whole(files: set[str]) -> bool:
    """Whether a repository has every shard that its shards' own names count."""
    shards = [re.fullmatch(r"(.*)-\d+-of-(\d+)\.safetensors", file) for file in files]
    counts = {(match[1], int(match[2])) for match in shards if match}
    if not counts:
        return any(file.endswith(".safetensors") and "/" not in file for file in files)
    return any(
        all(f"{stem}-{n:05d}-of-{count:05d}.safetensors" in files for n in range(1, count + 1))
        for stem, count in counts
    )


def _signature(checkpoint: Path) -> str:
    """Changes when any file of the checkpoint does; reads none of them."""
    stats = {
        str(file.relative_to(checkpoint)): [file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file()
    }
    return digest_json(stats)[:16]


def _announce(seen: Seen, fleet: str | None, old_base: str | None) -> None:
    """Post the event, and wait until the server has it."""
    payload = {"new_base": seen.model, "revision": seen.revision, "fleet": fleet or "", "old_base": old_base or ""}
    event = release(payload)
    with get_client(sync_client=True) as client:
        client.request("POST", "/events", json=[event.model_dump(mode="json")])


def release(payload: Mapping[str, str]) -> Event:
    """The event of a released base model. Any system may post the same one."""
    name = payload["new_base"]
    identity = f"lorasuite.base-model.{re.sub(r'[^A-Za-z0-9_.@-]+', '-', name).strip('-')}"
    resource = Resource({"prefect.resource.id": identity, "prefect.resource.name": Path(name).name})
    return Event(event=EVENT, resource=resource, payload=dict(payload))
