"""Several adapters as one: ``ΔW = Σ wᵢ·ΔWᵢ``, kept factored until the output is cut to its rank."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorasuite.adapters._contents import Contents, Update
from lorasuite.adapters._reader import Adapter
from lorasuite.adapters._writer import write_adapter
from lorasuite.bases import Checkpoint, digest_json, resolve
from lorasuite.errors import AdapterError, LoRASuiteError, Problem


@dataclass(frozen=True, eq=False)
class Combined(Adapter):
    """A weighted sum of adapters; its rank is the sum of theirs. Not on disk: :func:`materialise` writes it."""

    members: tuple[tuple[Adapter, float], ...]

    def check(self, checkpoint: Checkpoint) -> list[Problem]:
        """Why one of the adapters does not fit a base model; empty if all do."""
        return [problem for adapter, _ in self.members for problem in adapter.check(checkpoint)]

    def fingerprint(self) -> str:
        """A digest of what the adapters compute and of their weights in the sum."""
        return digest_json([[adapter.fingerprint(), weight] for adapter, weight in self.members])


def split_sources(text: str) -> list[tuple[str, float]]:
    """``a:0.7,b`` as ``[("a", 0.7), ("b", 1.0)]``; the name of a directory that exists as it is."""
    if Path(text).expanduser().is_dir():
        return [(text, 1.0)]
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(.+):(-?\d+(?:\.\d+)?(?:e-?\d+)?)", part)
        found.append((match[1], float(match[2])) if match else (part, 1.0))
    return found or [(text, 1.0)]


def open_adapters(text: str, allow_pickle: bool = False) -> Adapter:
    """One adapter, or several joined by commas, each with an optional weight.

    Raises:
        CheckpointError, AdapterError: as :class:`Adapter`, with the problems of all of them.
    """
    sources = split_sources(text)
    if len(sources) == 1 and sources[0][1] == 1:
        return Adapter.open(sources[0][0], allow_pickle)
    members: list[tuple[Adapter, float]] = []
    problems: list[Problem] = []
    for source, weight in sources:
        try:
            members.append((Adapter.open(source, allow_pickle), weight))
        except LoRASuiteError as error:
            problems += error.problems
    problems += [problem for adapter, _ in members for problem in _only_updates(adapter)]
    if problems:
        raise AdapterError(problems)
    return combine(members)


def combine(members: Sequence[tuple[Adapter, float]]) -> Combined:
    """The sum of adapters that hold nothing but updates."""
    parts: dict[str, list[tuple[Update, float]]] = {}
    for adapter, weight in members:
        for module, update in adapter.contents.updates.items():
            parts.setdefault(module, []).append((update, weight))
    updates = {module: _sum(parts[module]) for module in sorted(parts)}
    rank = max(update.rank for update in updates.values())
    first = members[0][0]
    config: Mapping[str, object] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "base_model_name_or_path": first.config.get("base_model_name_or_path"),
    }
    return Combined(first.path, config, Contents(updates), first.tensors, tuple(members))


def _sum(parts: Sequence[tuple[Update, float]]) -> Update:
    """The weighted sum of one module's updates, factors side by side."""

    def read(base: Checkpoint | None) -> tuple[Tensor, Tensor]:
        factors = [(update, weight, *update.read(base)) for update, weight in parts]
        return (
            torch.cat([B * (update.scaling * weight) for update, weight, B, _ in factors], 1),
            torch.cat([A for *_, A in factors]),
        )

    shape = next((update.shape for update, _ in parts if update.shape is not None), None)
    stored = all(update.stored for update, _ in parts)
    return Update(sum(update.rank for update, _ in parts), 1.0, shape, read, stored)


def _only_updates(adapter: Adapter) -> list[Problem]:
    """Why an adapter cannot be added to others."""
    c = adapter.contents
    found = {
        "use_dora": c.magnitudes,
        "bias": c.biases,
        "modules_to_save": c.saved,
        "trainable_token_indices": c.tokens,
    }
    return [
        Problem(f"{adapter.path}: {field}", "is not a sum of updates, and cannot be combined", "Migrate it by itself.")
        for field, held in found.items()
        if held
    ]


def materialise(text: str, base: Checkpoint, folder: Path, allow_pickle: bool = False) -> Path:
    """The directory of an adapter; of several, one written below ``folder`` under a name made of their content.

    Args:
        base: the old base, of which the modules are and from which some kinds are read.

    Raises:
        CheckpointError, AdapterError: as :func:`open_adapters`.
    """
    adapter = open_adapters(text, allow_pickle)
    if not isinstance(adapter, Combined):
        return resolve(split_sources(text)[0][0])
    output = folder / digest_json([adapter.fingerprint(), base.architecture.family])[:32]
    if output.is_dir():
        return output
    scratch = folder / f".{output.name}.{uuid.uuid4().hex[:8]}"
    updates = {module: adapter.update(module, base) for module in adapter.modules}
    rank = max(update.rank for update in updates.values())
    try:
        write_adapter(
            scratch,
            updates,
            architecture=base.architecture,
            dims=base.dims,
            base=str(adapter.config["base_model_name_or_path"] or base.source),
            rank=rank,
            alpha=rank,
        )
        if not output.is_dir():
            scratch.rename(output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return output
