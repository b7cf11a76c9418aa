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
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorasuite.architectures import ROLES, Architecture, Dimensions, Module, Role
from lorasuite.checkpoint import Checkpoint, digest_json, file_digest, read_json, resolve
from lorasuite.errors import AdapterError, CheckpointError, Problem
from lorasuite.lowrank import LowRank

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."

#: Config fields that do not change what ΔW is, or that are read here.
UNDERSTOOD = {
    "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "lora_ga_config", "loftq_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
    "ensure_weight_tying", "fan_in_fan_out",
}  # fmt: skip
#: Initialisations that change the base weight before training: ΔW would be against another base.
CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter on disk.

    Raises:
        CheckpointError: if files are missing or unreadable.
        AdapterError: with every reason why it cannot be migrated.
    """

    path: Path
    config: Mapping[str, Any]
    #: module path in the base model (``model.layers.0.self_attn.q_proj``) → scaling ``s``
    scaling: Mapping[str, float]
    _file: Path = field(repr=False)

    @classmethod
    def open(cls, source: str | Path) -> Adapter:
        """Read the config and the tensor names; factors are read when asked for."""
        path = resolve(source)
        config = read_json(path / CONFIG)
        problems = _config_problems(config, str(path / CONFIG))
        file = path / WEIGHTS
        if not file.is_file():
            what = (
                "has pickle weights only (adapter_model.bin)"
                if (path / "adapter_model.bin").is_file()
                else f"has no {WEIGHTS}"
            )
            problems.append(Problem(str(path), what, "Save it again with PEFT's save_pretrained."))
            raise AdapterError(problems)
        shapes = _shapes(file)
        pairs: dict[str, set[str]] = defaultdict(set)
        strange: list[str] = []
        for name in shapes:
            match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", name)
            if match:
                pairs[match[1]].add(match[2])
            else:
                strange.append(name)
        if strange and not problems:
            problems.append(
                Problem(
                    str(file),
                    f"holds {len(strange)} tensors that are not LoRA factors, such as {strange[0]}",
                    "Only LoRA updates of linear modules are migrated.",
                )
            )
        problems += [
            Problem(str(file), f"{module} has only lora_{sides.pop()}", "The file is damaged.")
            for module, sides in pairs.items()
            if len(sides) == 1
        ]
        for module, sides in pairs.items():
            if len(sides) == 2:
                ranks = shapes[f"{PREFIX}{module}.lora_B.weight"][1], shapes[f"{PREFIX}{module}.lora_A.weight"][0]
                if ranks[0] != ranks[1]:
                    what = f"{module} has lora_B of rank {ranks[0]} and lora_A of rank {ranks[1]}"
                    problems.append(Problem(str(file), what, "The file is damaged."))
        if not pairs and not problems:
            problems.append(Problem(str(file), "holds no LoRA factors", "There is nothing to migrate."))
        if problems:
            raise AdapterError(problems)
        scaling = {m: _scaling(config, m, shapes[f"{PREFIX}{m}.lora_A.weight"][0]) for m in sorted(pairs)}
        return cls(path, config, scaling, file)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules it updates, sorted."""
        return tuple(self.scaling)

    @property
    def rank(self) -> int:
        return int(self.config["r"])

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """``B (out, r)`` and ``A (r, in)`` as stored, in float32, without the scaling.

        Raises:
            AdapterError: if they hold NaN or Inf.
        """
        with safe_open(self._file, framework="pt") as handle:
            A = handle.get_tensor(f"{PREFIX}{module}.lora_A.weight").float()
            B = handle.get_tensor(f"{PREFIX}{module}.lora_B.weight").float()
        if not (bool(torch.isfinite(A).all()) and bool(torch.isfinite(B).all())):
            raise AdapterError(
                Problem(str(self._file), f"{module} holds NaN or Inf", "Training diverged: train it again.")
            )
        return B, A

    def update(self, module: str) -> LowRank:
        """``ΔW = s·B·A`` of one module, float64."""
        B, A = self.factors(module)
        return LowRank(B.double() * self.scaling[module], A.double())

    def by_layer(self, checkpoint: Checkpoint) -> dict[int, dict[str, Module]]:
        """Its modules by layer of a base model: ``{layer: {path: module}}``.

        Raises:
            AdapterError: naming every module the architecture does not describe or whose shape differs.
        """
        problems = self.check(checkpoint)
        if problems:
            raise AdapterError(problems)
        found: dict[int, dict[str, Module]] = defaultdict(dict)
        for path in self.modules:
            located = checkpoint.architecture.locate(path)
            assert located is not None
            found[located[0]][path] = located[1]
        return dict(sorted(found.items()))

    def check(self, checkpoint: Checkpoint) -> list[Problem]:
        """Why this adapter does not fit a base model; empty if it does."""
        problems: list[Problem] = []
        shapes = _shapes(self._file)
        for path in self.modules:
            located = checkpoint.architecture.locate(path)
            if located is None:
                problems.append(
                    Problem(
                        str(self._file),
                        f"{path} is not a linear module of a {checkpoint.architecture.family} block",
                        "Only block projections can be migrated: train without it.",
                    )
                )
                continue
            layer, module = located
            if layer >= checkpoint.dims.layers:
                problems.append(
                    Problem(
                        str(self._file),
                        f"{path} is beyond the old base's {checkpoint.dims.layers} layers",
                        "The adapter was trained on another base: give that one as --old-base.",
                    )
                )
                continue
            wanted = (
                sum(checkpoint.dims.rows(role) for role in module.roles),
                checkpoint.dims.columns(module.roles[0]),
            )
            got = (shapes[f"{PREFIX}{path}.lora_B.weight"][0], shapes[f"{PREFIX}{path}.lora_A.weight"][1])
            if got != wanted:
                problems.append(
                    Problem(
                        str(self._file),
                        f"{path} updates a {got} weight, the old base has {wanted}",
                        "The adapter was trained on another base: give that one as --old-base.",
                    )
                )
        return problems

    def roles(self, architecture: Architecture) -> tuple[Role, ...]:
        """The roles it updates in a base of that architecture."""
        held = {role for path in self.modules if (found := architecture.locate(path)) for role in found[1].roles}
        return tuple(role for role in ROLES if role in held)

    def fingerprint(self) -> str:
        """What the adapter computes, as a digest of its weights and its scalings."""
        return digest_json([file_digest(self._file), dict(self.scaling)])


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except Exception as error:
        raise CheckpointError(
            Problem(str(file), f"is not a readable safetensors file ({error})", "Save or download it again.")
        ) from error


def _config_problems(config: Mapping[str, Any], where: str) -> list[Problem]:
    """Everything in an adapter config that this version does not migrate."""
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        return [Problem(f"{where}: peft_type", f"{kind or 'none'} adapters are not supported", "Train a LoRA adapter.")]
    problems: list[Problem] = []
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            problems.append(Problem(f"{where}: {name}", f"is {value!r}", "It must be a positive number."))
    for name, value in config.items():
        empty = value in (None, False, {}, [], "", "none")
        if name in ("modules_to_save", "bias", "fan_in_fan_out") and not empty:
            problems.append(Problem(f"{where}: {name}", f"{value!r} is not supported", "Train without it."))
        elif name not in UNDERSTOOD and not empty:
            problems.append(
                Problem(
                    f"{where}: {name}",
                    f"{value!r} is not understood",
                    "It may change what the adapter computes, so it is refused.",
                )
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and CHANGES_BASE.search(init):
        problems.append(
            Problem(
                f"{where}: init_lora_weights",
                f"{init!r} changes the base weights before training",
                "Convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…).",
            )
        )
    return problems


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """``α/r``, or ``α/√r`` for rank-stabilised LoRA, with the module's own α where a pattern names it."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


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
) -> Path:
    """Write updates as a PEFT LoRA adapter directory.

    Args:
        updates: module path → update of at most ``rank``; the scaling is divided out of the factors.
        extra: module path → ``(B, A)`` to store as they are (fresh initialisations of layers without a partner).

    Raises:
        AdapterError: if every update is zero (an adapter that does nothing), or one holds NaN or Inf.
    """
    scaling = alpha / math.sqrt(rank) if use_rslora else alpha / rank
    tensors: dict[str, Tensor] = {}
    total = 0.0
    problems: list[Problem] = []
    for path, update in updates.items():
        size = update.norm()
        if not math.isfinite(size):
            problems.append(Problem(path, "its migrated update holds NaN or Inf", "Try another method."))
        total += size
        low = update if update.rank == rank else update.compress(rank)[0]
        root = math.sqrt(scaling)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = (low.A / root).float().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = (low.B / root).float().contiguous()
    if not problems and not total > 0:
        problems.append(Problem("adapter", "every migrated update is zero", "It would do nothing: it is not written."))
    if problems:
        raise AdapterError(problems)
    for path, (B, A) in (extra or {}).items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = A.float().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = B.float().contiguous()
    paths = sorted([*updates, *(extra or {})])
    from peft import LoraConfig, TaskType

    targets, layers = target_modules(paths, architecture, dims)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha if alpha != int(alpha) else int(alpha),
        target_modules=targets,
        layers_to_transform=layers,
        use_rslora=use_rslora,
        lora_dropout=0.0,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
    ).to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output / WEIGHTS, metadata={"format": "pt"})
    (output / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return output


def fresh_config(
    architecture: Architecture, roles: Sequence[Role], rank: int, alpha: float, use_rslora: bool = False
) -> Any:
    """The PEFT config of an untrained LoRA on the modules that hold some roles, in every layer of a base.

    What a team without the old adapter would train from scratch: the control of a fine-tune that starts from it.
    """
    from peft import LoraConfig, TaskType

    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=use_rslora,
        target_modules=sorted({m.name for m in architecture.modules if set(m.roles) & set(roles)}),
        lora_dropout=0.0,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )


def target_modules(
    paths: Sequence[str], architecture: Architecture, dims: Dimensions
) -> tuple[list[str], list[int] | None]:
    """The shortest PEFT ``target_modules`` and ``layers_to_transform`` that match exactly these modules.

    Short names (``q_proj``) where every covered layer has the same ones, as serving engines expect; full paths where
    layers differ.
    """
    by_layer: dict[int, set[str]] = defaultdict(set)
    leaves = [m.name.rsplit(".", 1)[-1] for m in architecture.modules]
    for path in paths:
        located = architecture.locate(path)
        if located is None:
            return sorted(paths), None
        leaf = located[1].name.rsplit(".", 1)[-1]
        by_layer[located[0]].add(leaf if leaves.count(leaf) == 1 else located[1].name)
    kinds = {frozenset(names) for names in by_layer.values()}
    if len(kinds) != 1:
        return sorted(paths), None
    covered = sorted(by_layer)
    return sorted(kinds.pop()), None if covered == list(range(dims.layers)) else covered


def check_loads(adapter: Path, base: Path, trust_remote_code: bool = False) -> None:
    """Check that PEFT finds exactly the adapter's tensors in the base model: none missing, none unexpected.

    The model is built on the meta device: no weight is read.

    Raises:
        AdapterError: naming the tensors that do not match.
    """
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(base), trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        model = inject_adapter_in_model(LoraConfig.from_pretrained(str(adapter)), model)
    wanted = {PREFIX + name: tuple(t.shape) for name, t in get_peft_model_state_dict(model).items()}
    found = _shapes(adapter / WEIGHTS)
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
