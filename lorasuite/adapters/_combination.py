"""Several adapters as one: ``ΔW = Σ wᵢ·ΔWᵢ``, kept factored until the output is cut to its rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorasuite.adapters._contents import Contents, Update
from lorasuite.adapters._files import initial_adapter
from lorasuite.adapters._left_out import left_out
from lorasuite.adapters._reader import Adapter
from lorasuite.adapters._sources import split_sources
from lorasuite.adapters._tidy import is_tidy, write_tidy
from lorasuite.adapters._writer import write_adapter
from lorasuite.bases import Checkpoint, digest_json
from lorasuite.errors import AdapterError, LoRASuiteError, Problem


@dataclass(frozen=True, eq=False)
class Combined(Adapter):
    """A weighted sum of adapters; its rank is the sum of theirs. Not on disk: :func:`write_ready` writes it."""

    members: tuple[tuple[Adapter, float], ...]

    def check(self, checkpoint: Checkpoint) -> list[Problem]:
        """Why one of the adapters does not fit a base model; empty if all do."""
        return [problem for adapter, _ in self.members for problem in adapter.check(checkpoint)]

    def fingerprint(self) -> str:
        """A digest of what the adapters compute and of their weights in the sum."""
        return digest_json([[adapter.fingerprint(), weight] for adapter, weight in self.members])


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
        if not math.isfinite(weight):
            problems.append(Problem(f"adapter: {source}", f"has the weight {weight}", "Give a number, as in A:0.7."))
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


def is_ready(adapter: Adapter, base: Checkpoint) -> bool:
    """Whether PEFT finds exactly the tensors of its file in the model that transformers builds of its base."""
    return not isinstance(adapter, Combined) and is_tidy(adapter, base)


def write_ready(adapter: Adapter, base: Checkpoint, folder: Path, base_name: str) -> Path:
    """Write an adapter so that PEFT finds its modules: a sum as one LoRA whose rank is the sum of the ranks, another
    under the names of the base's own model and without what is left out of it.

    Args:
        base: the old base, of which the modules are and from which some kinds are read.
        folder: directory to create.
        base_name: what the config names as its base.

    Raises:
        AdapterError: if factors hold NaN or Inf.
    """
    members = adapter.members if isinstance(adapter, Combined) else ((adapter, 1.0),)
    # What a changed base was before training lies in a folder of its own, and is part of the sum.
    if not isinstance(adapter, Combined) and (
        initial_adapter(adapter.path) is None or not adapter.plain(base.architecture)
    ):
        return write_tidy(adapter, base, folder, base_name)
    idle = {module for member, _ in members for module in left_out(member, base).modules}
    own = base.architecture.own_name
    updates = {own(module): adapter.update(module, base) for module in adapter.modules if module not in idle}
    rank = max(update.rank for update in updates.values())
    return write_adapter(
        folder,
        updates,
        architecture=base.architecture,
        dims=base.dims,
        base=base_name,
        rank=rank,
        alpha=rank,
        experts=base.expert_count,
    )
