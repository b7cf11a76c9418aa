"""A PEFT adapter on disk, checked against its base and read as factored updates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from lorasuite.adapters._adalora_format import read_adalora
from lorasuite.adapters._base_modules import vocabulary_shape, vocabulary_side
from lorasuite.adapters._config_patterns import pattern_problems, unmatched
from lorasuite.adapters._contents import Contents, Read, Update
from lorasuite.adapters._delta_format import read_delta
from lorasuite.adapters._files import CONFIG, PICKLE, PREFIX, WEIGHTS, Tensors, elsewhere, initial_adapter
from lorasuite.adapters._kinds import ORDERED, changes_base, config_problems, kind_of
from lorasuite.adapters._left_out import left_out
from lorasuite.adapters._lora_format import read_lora
from lorasuite.adapters._lowrank import LowRank
from lorasuite.bases import (
    Architecture,
    Checkpoint,
    Module,
    Role,
    digest_json,
    file_digest,
    in_order,
    module_order,
    read_config_json,
    resolve,
)
from lorasuite.errors import AdapterError, CheckpointError, Problem, examples

#: Config fields that say nothing about what an adapter computes.
INERT = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")


@dataclass(frozen=True, eq=False)
class Adapter:
    """A PEFT adapter on disk, read as factored updates whatever its kind; :meth:`open` makes one.

    Attributes:
        path: its directory.
        config: its ``adapter_config.json``.
        contents: where each of its updates, and all that lies beside them, comes from.
        tensors: its weight file.
    """

    path: Path
    config: Mapping[str, Any]
    contents: Contents = field(repr=False)
    tensors: Tensors = field(repr=False)

    @classmethod
    def open(cls, source: str | Path, allow_pickle: bool = False) -> Adapter:
        """Read the config and the tensor names; factors are read when asked for.

        Args:
            allow_pickle: read ``adapter_model.bin`` where there is no safetensors file, with ``weights_only=True``.

        Raises:
            CheckpointError: if files are missing or unreadable.
            AdapterError: with every reason why it cannot be migrated.
        """
        path = resolve(source)
        if not (path / CONFIG).is_file() and (found := elsewhere(path)):
            name, _, revision = str(source).partition("@")
            example = f"{name}/{found[0]}" + (f"@{revision}" if revision else "")
            remedy = f"There is one in {examples([f'{folder}/' for folder in found])}: give that directory, {example}."
            raise AdapterError([Problem(str(path / CONFIG), "is missing", remedy)])
        config = read_config_json(path / CONFIG)
        problems = config_problems(config, str(path / CONFIG), initial_adapter(path) is not None)
        file = path / WEIGHTS
        if not file.is_file() and (path / PICKLE).is_file():
            if allow_pickle:
                file = path / PICKLE
            else:
                what = f"has pickle weights only ({PICKLE})"
                fix = "Save it again with PEFT's save_pretrained, or give --allow-pickle if you trust it."
                problems.append(Problem(str(path), what, fix))
        elif not file.is_file():
            problems.append(Problem(str(path), f"has no {WEIGHTS}", "Save it again with PEFT's save_pretrained."))
        if problems:
            raise AdapterError(problems)
        tensors = Tensors(file)
        if problem := _empty(tensors):
            raise AdapterError(problem)
        names = [name.removeprefix(PREFIX) for name in tensors.shapes]
        if problems := pattern_problems(config, names, str(path / CONFIG)):
            raise AdapterError(problems)
        contents, problems = _read(path, config, tensors)
        problems = problems or unmatched(config, contents.updates, str(path / CONFIG))
        if problems:
            raise AdapterError(problems)
        return cls(path, config, contents, tensors)

    @property
    def kind(self) -> str:
        """Its PEFT type in capitals, or ``DORA``."""
        return "DORA" if self.contents.magnitudes else kind_of(self.config)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules it updates, sorted."""
        return tuple(self.contents.updates)

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(update.rank for update in self.contents.updates.values())

    @property
    def scaling(self) -> dict[str, float]:
        """Module path → the scaling ``s`` of ``ΔW = s·B·A``."""
        return {module: update.scaling for module, update in self.contents.updates.items()}

    @property
    def stored(self) -> bool:
        """Whether its factors lie in its file, and reading them takes no base and no computation."""
        return all(update.stored for update in self.contents.updates.values())

    def lora_settings(self, rank: int) -> dict[str, Any]:
        """Arguments of :func:`write_adapter` that keep the scaling it was trained with: ``rank, alpha, use_rslora``."""
        kind, rslora = kind_of(self.config), bool(self.config.get("use_rslora"))
        if kind not in ("LORA", "ADALORA"):
            return {"rank": rank, "alpha": rank, "use_rslora": False}
        growth = rank / self.config["r" if kind == "LORA" else "init_r"]
        alpha = self.config["lora_alpha"] * (math.sqrt(growth) if rslora else growth)
        return {"rank": rank, "alpha": alpha, "use_rslora": rslora}

    def factors(self, module: str, base: Checkpoint | None = None) -> tuple[Tensor, Tensor]:
        """``B (out, r)`` and ``A (r, in)`` without the scaling.

        Args:
            base: the old base, which only adapters that are not :attr:`stored` need.

        Raises:
            AdapterError: if they hold NaN or Inf, or the base is needed and missing.
        """
        return self.contents.updates[module].read(base)

    def update(self, module: str, base: Checkpoint | None = None) -> LowRank:
        """``ΔW = s·B·A`` of one module, float64. See :meth:`factors`."""
        B, A = self.factors(module, base)
        return LowRank(B.double() * self.contents.updates[module].scaling, A.double())

    def extra(self, name: str) -> Tensor:
        """A tensor beside the updates that the contents name, float64.

        Raises:
            AdapterError: if it holds NaN or Inf.
        """
        return self.tensors.tensor(name).double()

    def by_layer(self, checkpoint: Checkpoint) -> dict[int, dict[str, Module]]:
        """Its block modules by layer of a base model: ``{layer: {path: module}}``.

        Raises:
            AdapterError: naming every module the architecture does not describe or whose shape differs.
        """
        problems = self.check(checkpoint)
        if problems:
            raise AdapterError(problems)
        found: dict[int, dict[str, Module]] = defaultdict(dict)
        for path in self.modules:
            located = checkpoint.architecture.locate(path)
            if located is not None:
                found[located[0]][path] = located[1]
        return dict(sorted(found.items()))

    def plain(self, architecture: Architecture) -> bool:
        """Whether it holds updates of blocks only: no magnitudes, biases, saved modules or embeddings."""
        c = self.contents
        return not (c.magnitudes or c.biases or c.saved or c.tokens or self.vocabulary_modules(architecture))

    def vocabulary_modules(self, architecture: Architecture) -> list[str]:
        """Paths of the embeddings it changes, in whatever way."""
        c = self.contents
        return sorted(path for path in {*c.updates, *c.saved, *c.tokens} if vocabulary_side(architecture, path))

    def left_out(self, checkpoint: Checkpoint) -> list[tuple[str, str]]:
        """``(module, why)`` of what its file holds and what changes nothing in its base.

        Raises:
            AdapterError: if an update holds NaN or Inf.
            CheckpointError: if the base cannot be read.
        """
        return list(left_out(self, checkpoint).rows)

    def check(self, checkpoint: Checkpoint) -> list[Problem]:
        """Why this adapter does not fit a base model; empty if it does.

        Raises:
            AdapterError: if an update that may be left out holds NaN or Inf.
            CheckpointError: if the base cannot be read.
        """
        if problems := pattern_problems(self.config, checkpoint.shapes(), str(self.path / CONFIG)):
            return problems  # PEFT would match them with the base's modules
        idle = left_out(self, checkpoint)
        problems = list(idle.problems)
        wrong_base = "The adapter was trained on another base: give that one as --old-base."
        where, shapes = str(self.tensors.file), self.tensors.shapes
        if self.vocabulary_modules(checkpoint.architecture) and self.config.get("ensure_weight_tying"):
            problems.append(
                Problem(
                    f"{self.path / CONFIG}: ensure_weight_tying",
                    "ties the changes of two embeddings, which is not migrated",
                    "Train without it, or without the embeddings.",
                )
            )
        if kind_of(self.config) in ORDERED:
            try:
                module_order(checkpoint)
            except CheckpointError as error:
                problems += error.problems
        for path, update in self.contents.updates.items():
            if vocabulary_side(checkpoint.architecture, path) is not None:
                wanted: tuple[int, ...] = vocabulary_shape(checkpoint, path)
                if update.shape is not None and update.shape != wanted:
                    what = f"{path} updates a {update.shape} weight, the old base has {wanted}"
                    problems.append(Problem(where, what, wrong_base))
                continue
            if path in idle.modules:
                continue
            if checkpoint.architecture.locate_expert(path) is not None and kind_of(self.config) == "LORA":
                problems += self._expert_problems(checkpoint, path, update)
                continue
            located = checkpoint.architecture.locate(path)
            if located is None and kind_of(self.config) == "LORA" and checkpoint.architecture.refusal(path):
                continue  # the old base runs with it; it is dropped with the reason
            if located is None:
                problems.append(
                    Problem(
                        where,
                        f"{path} is not a linear module of a {checkpoint.architecture.family} block",
                        checkpoint.architecture.refusal(path)
                        or "Only block projections and embeddings can be migrated: train without it.",
                    )
                )
                continue
            layer, module = located
            if layer >= checkpoint.dims.layers:
                what = f"{path} is beyond the old base's {checkpoint.dims.layers} layers"
                problems.append(Problem(where, what, wrong_base))
                continue
            if module not in checkpoint.modules(layer):
                what = f"{path} is not in the old base, whose layer {layer} is of another kind"
                problems.append(Problem(where, what, wrong_base))
                continue
            dims = checkpoint.layer_dims(layer)
            wanted = sum(dims.rows(role) for role in module.roles), dims.columns(module.roles[0])
            if update.shape is not None and update.shape != wanted:
                what = f"{path} updates a {update.shape} weight, the old base has {wanted}"
                problems.append(Problem(where, what, wrong_base))
        for path, name in self.contents.saved.items():
            if vocabulary_side(checkpoint.architecture, path) is None:
                problems.append(
                    Problem(
                        f"{self.path / CONFIG}: modules_to_save",
                        f"{path} is trained as a whole, and is neither the input nor the output embedding",
                        "Only embeddings are carried over, by their shared tokens: train without it.",
                    )
                )
            elif shapes[name] != (wanted := vocabulary_shape(checkpoint, path)):
                problems.append(
                    Problem(
                        f"{self.path / CONFIG}: modules_to_save",
                        f"{path} is {shapes[name]}, the old base has {wanted}",
                        "Tokens that the adapter added have no counterpart in the new base: train without them.",
                    )
                )
        for path, (name, ids) in self.contents.tokens.items():
            side = vocabulary_side(checkpoint.architecture, path)
            wanted = (0, 0) if side is None else vocabulary_shape(checkpoint, path)
            if side is None or shapes[name][1] != wanted[1] or any(n >= wanted[0] for n in ids):
                what = f"{path} has trained tokens that the old base does not have"
                problems.append(Problem(f"{self.path / CONFIG}: trainable_token_indices", what, wrong_base))
        return problems

    def _expert_problems(self, base: Checkpoint, path: str, update: Update) -> list[Problem]:
        """Why an update of an expert does not fit a base model."""
        located = base.architecture.locate_expert(path)
        assert located is not None
        layer, number, module = located
        where, wrong_base = str(self.tensors.file), "The adapter was trained on another base: give that one."
        dims = base.experts(layer) if layer < base.dims.layers else None
        if dims is None or number >= base.expert_count:
            return [Problem(where, f"{path} is not in the old base, which has no such expert", wrong_base)]
        wanted = sum(dims.rows(role) for role in module.roles), dims.columns(module.roles[0])
        if update.shape is not None and update.shape != wanted:
            what = f"{path} updates a {update.shape} weight, the old base has {wanted}"
            return [Problem(where, what, wrong_base)]
        if changes_base(self.config):
            what = "took factors out of the weights of experts before training, which is not undone"
            return [Problem(f"{self.path / CONFIG}: init_lora_weights", what, "Train with another start.")]
        return []

    def experts(self, architecture: Architecture) -> dict[int, dict[int, dict[str, Module]]]:
        """Its updates of experts: ``{layer: {expert: {path: module}}}``."""
        found: dict[int, dict[int, dict[str, Module]]] = defaultdict(lambda: defaultdict(dict))
        for path in self.modules:
            located = architecture.locate_expert(path)
            if located is not None:
                found[located[0]][located[1]][path] = located[2]
        return {layer: dict(sorted(experts.items())) for layer, experts in sorted(found.items())}

    def refused(self, architecture: Architecture) -> dict[str, str]:
        """Path → why, of its modules that the old base runs with and that no transform moves."""
        outside = (path for path in self.modules if not architecture.locate(path))
        return {
            path: why
            for path in outside
            if not architecture.locate_expert(path) and (why := architecture.refusal(path))
        }

    def roles(self, architecture: Architecture) -> tuple[Role, ...]:
        """The roles it updates in a base of that architecture."""
        located = (architecture.locate(path) for path in self.modules)
        return in_order(role for found in located if found for role in found[1].roles)

    def fingerprint(self) -> str:
        """What the adapter computes, as a digest of its weights and its scalings (of its config, if it is no LoRA)."""
        parts: list[Any] = [file_digest(self.tensors.file), self.scaling]
        plain = kind_of(self.config) == "LORA" and self.stored and not self.contents.tokens
        if not plain:
            parts.append({name: value for name, value in self.config.items() if name not in INERT})
        start = initial_adapter(self.path)
        if start is not None:
            parts.append(file_digest(start / WEIGHTS))
        return digest_json(parts)


def _empty(tensors: Tensors) -> Problem | None:
    """What is wrong with a file of which a sharded training left the tensors' names alone."""
    empty = [name for name, shape in tensors.shapes.items() if shape == (0,)]
    if not empty:
        return None
    what = f"holds {len(empty)} empty tensors of {len(tensors.shapes)}, such as {empty[0].removeprefix(PREFIX)}"
    remedy = (
        "Each process of a sharded training (DeepSpeed ZeRO-3) has a part of every tensor: save with "
        "stage3_gather_16bit_weights_on_model_save, or gather the checkpoint with zero_to_fp32.py."
    )
    return Problem(str(tensors.file), what, remedy)


def _read(folder: Path, config: Mapping[str, Any], weights: Tensors) -> Read:
    """Read any adapter whose config has no problems."""
    reader = {"LORA": read_lora, "ADALORA": read_adalora}.get(kind_of(config), read_delta)
    return reader(folder, config, weights)
