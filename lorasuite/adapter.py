"""PEFT adapters: read as factored updates, written as what ``PeftModel.from_pretrained`` loads."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorasuite.adapter_types import (
    CONFIG,
    ORDERED,
    PICKLE,
    PREFIX,
    Contents,
    Tensors,
    config_problems,
    initial_adapter,
    kind_of,
    read_contents,
)
from lorasuite.adapter_types import SAFETENSORS as WEIGHTS
from lorasuite.architectures import ROLES, Architecture, Dimensions, Module, Role
from lorasuite.checkpoint import (
    Checkpoint,
    auto_class,
    digest_json,
    file_digest,
    module_order,
    read_json,
    resolve,
)
from lorasuite.errors import AdapterError, CheckpointError, ConfigError, Problem
from lorasuite.lowrank import LowRank

__all__ = [
    "CONFIG", "PREFIX", "WEIGHTS", "Adapter", "Extras", "OutputType", "check_loads", "fresh_config", "fresh_lora",
    "fuse_updates", "not_in_adalora", "split_update", "target_modules", "untrained", "vocabulary_side",
    "write_adapter",
]  # fmt: skip

#: What an adapter is written as; a DoRA stays one.
OutputType = Literal["lora", "adalora"]
#: Config fields that say nothing about what an adapter computes.
INERT = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")


@dataclass(frozen=True, eq=False)
class Adapter:
    """A PEFT adapter on disk, of any kind :mod:`lorasuite.adapter_types` reads.

    Raises:
        CheckpointError: if files are missing or unreadable.
        AdapterError: with every reason why it cannot be migrated.
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
        """
        path = resolve(source)
        config = read_json(path / CONFIG)
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
        contents, problems = read_contents(path, config, tensors)
        if problems:
            raise AdapterError(problems)
        return cls(path, config, contents, tensors)

    @property
    def kind(self) -> str:
        """What it is, for people: its PEFT type, or ``DORA``."""
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
        """A tensor beside the updates (see :class:`lorasuite.adapter_types.Contents`), float64."""
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

    def check(self, checkpoint: Checkpoint) -> list[Problem]:
        """Why this adapter does not fit a base model; empty if it does."""
        problems: list[Problem] = []
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
            located = checkpoint.architecture.locate(path)
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
                what = f"{path} is not in the old base, whose layer {layer} has another kind of MLP"
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

    def roles(self, architecture: Architecture) -> tuple[Role, ...]:
        """The roles it updates in a base of that architecture."""
        held = {role for path in self.modules if (found := architecture.locate(path)) for role in found[1].roles}
        return tuple(role for role in ROLES if role in held)

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


def vocabulary_side(architecture: Architecture, path: str) -> Literal["input", "output"] | None:
    """Which embedding a module path is, if it is one."""
    if path in architecture.names(architecture.embedding):
        return "input"
    return "output" if path in architecture.names(architecture.unembedding) else None


def vocabulary_weight(checkpoint: Checkpoint, path: str) -> str:
    """The name of an embedding's tensor: a tied output embedding is the input one."""
    names = [path + ".weight"]
    if vocabulary_side(checkpoint.architecture, path) == "output":
        names.append(checkpoint.architecture.unembedding + ".weight")
    names.append(checkpoint.architecture.embedding + ".weight")
    return next((found for name in names if (found := checkpoint.find(name)) is not None), names[0])


def vocabulary_shape(checkpoint: Checkpoint, path: str) -> tuple[int, int]:
    """``(V, d)`` of an embedding."""
    rows, columns = checkpoint.shape(vocabulary_weight(checkpoint, path))
    return rows, columns


def split_update(update: LowRank, module: Module, dims: Dimensions) -> dict[Role, LowRank]:
    """A module's update as one update a role; roles of a fused module share the very same ``A``."""
    return {role: LowRank(B, update.A) for role, B in module.split(update.B, dims).items()}


def fuse_updates(parts: Mapping[Role, LowRank], module: Module, dims: Dimensions) -> LowRank:
    """The inverse of :func:`split_update`; roles without an update count as zero."""
    if module.layout == "plain":
        return parts[module.roles[0]]
    filled = [parts.get(role) or LowRank.zeros(dims.rows(role), dims.columns(role)) for role in module.roles]
    stacked = LowRank.stack_rows(filled)
    rows = dict(zip(module.roles, stacked.B.split([p.shape[0] for p in filled]), strict=True))
    return LowRank(module.fuse(rows, dims), stacked.A)


@dataclass(eq=False)
class Extras:
    """What a written adapter holds beside its updates, by module path of the new base.

    ``magnitudes`` ``(out,)`` of every module make it a DoRA; ``biases`` ``(out,)`` replace those of its modules;
    ``saved`` ``(V, d)`` replace embeddings; ``tokens`` are ids and the rows ``(n, d)`` that replace theirs.
    """

    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names PEFT gives them."""
        named = {f"{path}.lora_magnitude_vector": value for path, value in self.magnitudes.items()}
        named |= {f"{path}.base_layer.bias": value for path, value in self.biases.items()}
        named |= {f"{path}.weight": value for path, value in self.saved.items()}
        named |= {f"{path}.token_adapter.trainable_tokens_delta": rows for path, (_, rows) in self.tokens.items()}
        return {PREFIX + name: value.float().contiguous() for name, value in named.items()}

    def settings(self) -> dict[str, Any]:
        """The fields of PEFT's ``LoraConfig`` that go with it."""
        leaves = {path: path.rpartition(".")[2] for path in [*self.saved, *self.tokens]}
        return {
            "use_dora": bool(self.magnitudes),
            "bias": "lora_only" if self.biases else "none",
            "modules_to_save": sorted(leaves[path] for path in self.saved) or None,
            "trainable_token_indices": {leaves[path]: ids for path, (ids, _) in self.tokens.items()} or None,
        }


def write_adapter(
    output: Path,
    updates: Mapping[str, LowRank],
    *,
    architecture: Architecture,
    dims: Dimensions,
    base: str,
    revision: str | None = None,
    rank: int,
    alpha: float,
    use_rslora: bool = False,
    extra: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    extras: Extras | None = None,
    output_type: OutputType = "lora",
) -> Path:
    """Write updates as a PEFT adapter directory.

    Args:
        updates: module path → update ``(out, in)``, of an embedding ``(V, d)``, cut to ``rank``; the scaling is divided
            out of the factors.
        extra: module path → ``(B, A)`` to store as they are (fresh initialisations of layers without a partner).
        extras: what lies beside the updates.
        output_type: ``adalora`` writes each update as its SVD, every module with the rank it has.

    Raises:
        AdapterError: if every update is zero (an adapter that does nothing), or one holds NaN or Inf, or the output
            type cannot hold it.
    """
    beside, fresh = extras or Extras(), extra or {}
    sizes = {path: update.norm() for path, update in updates.items()}
    problems = [
        Problem(path, "its migrated update holds NaN or Inf", "Try another method.")
        for path, size in sizes.items()
        if not math.isfinite(size)
    ]
    if not problems and not sum(sizes.values()) > 0:
        problems.append(Problem("adapter", "every migrated update is zero", "It would do nothing: it is not written."))
    if output_type == "adalora":
        outside = [path for path in updates if vocabulary_side(architecture, path)]
        problems += not_in_adalora(outside or beside.saved or beside.tokens, beside.magnitudes, beside.biases)
    if problems:
        raise AdapterError(problems)
    if output_type == "adalora":
        tensors, own = _adalora_tensors(updates, fresh, rank, alpha)
    else:
        scaling = alpha / math.sqrt(rank) if use_rslora else alpha / rank
        tensors = {**beside.tensors(), **_lora_tensors(updates, fresh, rank, scaling, architecture)}
        own = {"r": rank, "use_rslora": use_rslora, **beside.settings()}
    from peft import AdaLoraConfig, LoraConfig, TaskType

    targets, layers = target_modules(sorted([*updates, *fresh]), architecture, dims)
    config = (AdaLoraConfig if output_type == "adalora" else LoraConfig)(
        lora_alpha=alpha if alpha != int(alpha) else int(alpha),
        target_modules=targets,
        layers_to_transform=layers,
        fan_in_fan_out=_fan_in_fan_out(architecture),
        lora_dropout=0.0,
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
        **own,
    ).to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output / WEIGHTS, metadata={"format": "pt"})
    (output / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return output


def not_in_adalora(embeddings: object, magnitudes: object, biases: object) -> list[Problem]:
    """Why an adapter cannot be written as AdaLoRA: what it holds that PEFT's has no place for."""
    found = {"changes of embeddings": embeddings, "magnitudes (DoRA)": magnitudes, "biases": biases}
    return [
        Problem("output_type", f"an AdaLoRA cannot hold {what}", "Use --output-type lora.")
        for what, held in found.items()
        if held
    ]


def _lora_tensors(
    updates: Mapping[str, LowRank],
    fresh: Mapping[str, tuple[Tensor, Tensor]],
    rank: int,
    scaling: float,
    architecture: Architecture,
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path, update in updates.items():
        low = update if update.rank == rank else update.compress(rank)[0]
        root = math.sqrt(scaling)
        B, A = low.B / root, low.A / root
        if vocabulary_side(architecture, path) == "input":  # (V, d) is (in, out), and PEFT adds the transpose of B·A
            tensors[f"{PREFIX}{path}.lora_embedding_A"] = B.T.float().contiguous()
            tensors[f"{PREFIX}{path}.lora_embedding_B"] = A.T.float().contiguous()
            continue
        tensors[f"{PREFIX}{path}.lora_A.weight"] = A.float().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = B.float().contiguous()
    for path, (B, A) in fresh.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = A.float().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = B.float().contiguous()
    return tensors


def _adalora_tensors(
    updates: Mapping[str, LowRank], fresh: Mapping[str, tuple[Tensor, Tensor]], rank: int, alpha: float
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """``ΔW = α/(r + 10⁻⁵)·B·diag(E)·A`` with ``B``, ``A`` orthonormal, and the config fields that go with it.

    The rank pattern says how many of the ``r`` directions a module has, as PEFT's own pruning writes it.
    """
    tensors: dict[str, Tensor] = {}
    pattern: dict[str, list[bool]] = {}
    scaling = alpha / (rank + 1e-5)
    generator = torch.Generator().manual_seed(0)
    for path, update in updates.items():
        u, s, vh = update.svd()
        kept = min(max(int((s > 1e-9 * s[0]).sum()), 1), rank)  # below is rounding in float64
        parts = u[:, :kept], s[:kept, None] / scaling, vh[:kept]
        pattern[f"{path}.lora_E"] = [n < kept for n in range(rank)]
        tensors |= {f"{PREFIX}{path}.lora_{side}": t.float().contiguous() for side, t in zip("BEA", parts, strict=True)}
    for path, (B, A) in fresh.items():
        # E is what starts at zero here, and B must not: PEFT draws it like this
        start = torch.empty(B.shape).normal_(std=0.02, generator=generator)
        parts = start, torch.zeros(rank, 1), A
        pattern[f"{path}.lora_E"] = [True] * rank
        tensors |= {f"{PREFIX}{path}.lora_{side}": t.float().contiguous() for side, t in zip("BEA", parts, strict=True)}
    mean = round(sum(map(sum, pattern.values())) / len(pattern))
    # The schedule is over: one step, of which PEFT asks for at least one.
    return tensors, {"init_r": rank, "target_r": mean, "total_step": 1, "rank_pattern": pattern}


def fresh_lora(adapter: Path, architecture: Architecture) -> dict[str, Any]:
    """Settings of an untrained LoRA like an adapter: its rank, alpha and modules, in every layer of the base.

    What a team without the adapter would train from scratch: the control of a fine-tune that starts from it. JSON.
    """
    opened = Adapter.open(adapter)
    names = sorted({located[1].name for path in opened.modules if (located := architecture.locate(path))})
    return {
        "r": opened.rank,
        "lora_alpha": opened.config["lora_alpha"],
        "use_rslora": bool(opened.config.get("use_rslora")),
        "use_dora": bool(opened.config.get("use_dora")),
        "fan_in_fan_out": _fan_in_fan_out(architecture),
        "target_modules": _everywhere(names, architecture),
    }


def untrained(
    roles: Sequence[Role], architecture: Architecture, *, kind: str, rank: int, scaling: float, steps: int
) -> dict[str, Any]:
    """Settings of an untrained adapter of some projections in every layer of a base. JSON, for :func:`fresh_config`.

    A fused module is trained as a whole where one of its roles is asked for.

    Args:
        kind: ``lora``, ``dora``, or ``adalora``, which begins with half as much rank again and prunes down to
            ``rank`` from the first to the last tenth of its training.
        scaling: alpha / rank.
        steps: optimiser steps of its training, which only AdaLoRA has to know.

    Raises:
        ConfigError: for AdaLoRA in fewer than ten steps.
    """
    names = sorted(module.name for module in architecture.modules if set(module.roles) & set(roles))
    settings: dict[str, Any] = {
        "r": rank,
        "lora_alpha": scaling * rank,
        "use_rslora": False,
        "use_dora": kind == "dora",
        "fan_in_fan_out": _fan_in_fan_out(architecture),
        "target_modules": _everywhere(names, architecture),
    }
    if kind != "adalora":
        return settings
    if steps < 10:
        raise ConfigError(Problem("adalora", f"cannot prune in {steps} steps", "Train for at least ten."))
    start, tenth = rank + (rank + 1) // 2, steps // 10
    del settings["r"], settings["use_rslora"], settings["use_dora"]
    schedule = {"init_r": start, "target_r": rank, "total_step": steps, "tinit": tenth, "tfinal": tenth}
    return {**settings, **schedule, "lora_alpha": scaling * start}


def _everywhere(names: Sequence[str], architecture: Architecture) -> list[str] | str:
    """PEFT's ``target_modules`` for block modules of every layer."""
    if not architecture.text_config:
        return list(names)
    # A name alone would match a vision tower's modules, too: PEFT takes one string as a pattern of whole paths.
    return rf"{re.escape(architecture.layers)}\.\d+\.({'|'.join(map(re.escape, names))})"


def fresh_config(settings: Mapping[str, Any]) -> Any:
    """The PEFT config of :func:`fresh_lora` or :func:`untrained`."""
    from peft import AdaLoraConfig, LoraConfig, TaskType

    chosen = AdaLoraConfig if "init_r" in settings else LoraConfig
    return chosen(**settings, lora_dropout=0.0, bias="none", task_type=TaskType.CAUSAL_LM)


def _fan_in_fan_out(architecture: Architecture) -> bool:
    """Whether its weights are stored ``(in, out)``, which PEFT asks to be told."""
    return any(module.transposed for module in architecture.modules)


def target_modules(
    paths: Sequence[str], architecture: Architecture, dims: Dimensions
) -> tuple[list[str], list[int] | None]:
    """The shortest PEFT ``target_modules`` and ``layers_to_transform`` that match exactly these modules.

    Short names (``q_proj``) where every covered layer has the same ones, as serving engines expect; full paths where
    layers differ, or where a multimodal base may have the same names elsewhere.
    """
    if architecture.text_config:
        return sorted(paths), None
    by_layer: dict[int, set[str]] = defaultdict(set)
    leaves = [m.name.rsplit(".", 1)[-1] for m in architecture.modules]
    embeddings = [path for path in paths if vocabulary_side(architecture, path)]
    for path in paths:
        if path in embeddings:
            continue
        located = architecture.locate(path)
        if located is None:
            return sorted(paths), None
        leaf = located[1].name.rsplit(".", 1)[-1]
        by_layer[located[0]].add(leaf if leaves.count(leaf) == 1 else located[1].name)
    kinds = {frozenset(names) for names in by_layer.values()}
    covered = sorted(by_layer)
    everywhere = covered == list(range(dims.layers))
    # layers_to_transform would leave out the embeddings, which are in no layer
    if len(kinds) != 1 or (embeddings and not everywhere):
        return sorted(paths), None
    return sorted({*kinds.pop(), *(path.rpartition(".")[2] for path in embeddings)}), None if everywhere else covered


def check_loads(adapter: Path, base: Path, trust_remote_code: bool = False) -> None:
    """Check that PEFT finds exactly the adapter's tensors in the base model: none missing, none unexpected.

    The model is built on the meta device: no weight is read.

    Raises:
        AdapterError: naming the tensors that do not match.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from transformers import AutoConfig

    own = PeftConfig.from_pretrained(str(adapter))
    # A pattern of ranks is applied to values, which a meta tensor has not: it is counted below.
    pattern = getattr(own, "rank_pattern", None) if kind_of({"peft_type": own.peft_type.value}) == "ADALORA" else None
    if pattern:
        own.rank_pattern = None
    config = AutoConfig.from_pretrained(str(base), trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
        model = PeftModel(model, own)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, mask in (pattern or {}).items():
        path = PREFIX + name.rpartition(".")[0]
        (rows, _), (_, columns) = wanted[f"{path}.lora_B"], wanted[f"{path}.lora_A"]
        shapes = {"A": (sum(mask), columns), "B": (rows, sum(mask)), "E": (sum(mask), 1)}
        wanted |= {f"{path}.lora_{side}": shape for side, shape in shapes.items()}
    found = Tensors(adapter / WEIGHTS).shapes
    problems = [
        Problem(
            str(adapter),
            f"{name} is {found.get(name, 'missing')}, PEFT expects {wanted.get(name, 'nothing')}",
            "This is a fault of lorasuite: please report it.",
        )
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if problems:
        raise AdapterError(problems)
