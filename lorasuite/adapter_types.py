"""How each kind of PEFT adapter is read: one function a PEFT type, and a reason for each type that is not read.

Whatever the kind, an adapter is read as :class:`Contents`: for each module a factored update of its weight
``(out, in)``, and beside the updates what is none (DoRA's magnitudes, biases, trained embeddings).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lorasuite.checkpoint import Checkpoint, module_order, read_json
from lorasuite.errors import AdapterError, CheckpointError, Problem
from lorasuite.peft_delta import BIASED, WEIGHTED, DeltaReader, needs_weights

SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."

#: Rank of the new adapter where the old one's method has none.
DEFAULT_RANK = 16

#: Fields of a LoRA config that do not change what ΔW is, or that are read here. Any other one that is set is refused.
UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "trainable_token_indices", "use_dora",
    "use_rslora", "velora_config",
}  # fmt: skip
#: LoRA fields that are known, and refused where they are set.
REFUSED_FIELDS = {
    "alora_invocation_tokens": "switches the adapter on from certain tokens on, which the new vocabulary may not have",
    "arrow_config": "routes each token to one of several adapters",
    "kasa_config": "takes the smallest directions out of the old base's weights before training",
    "layer_replication": "builds a deeper base model, whose layers have no counterpart of their own",
    "lora_bias": "adds a bias to each update, which no LoRA without one can hold",
    "megatron_config": "belongs to a model split by Megatron",
    "monteclora_config": "learns a distribution of updates, not one",
    "target_parameters": "updates parameters that are no linear modules, such as fused experts",
    "use_bdlora": "makes the factors block-diagonal, which the file does not show",
    "use_qalora": "pools each input in groups before the update",
}
#: The training schedule of AdaLoRA, and what it inherits from LoRA.
ADALORA_UNDERSTOOD = UNDERSTOOD - {"use_dora", "trainable_token_indices", "modules_to_save"} | {
    "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
}  # fmt: skip

#: Initialisations that change the base weight before training: ΔW is against another base.
CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)
#: Those of them that can be computed again from the old base's weight.
REPRODUCIBLE = ("pissa", "olora")

#: Methods that leave each weight with a ΔW, read through PEFT's own classes.
DELTA = (
    "C3A", "DELORA", "FOURIERFT", "GRALORA", "LOHA", "LOKR", "MISS", "RANDLORA", "TINYLORA", "VBLORA", "VERA", "WAVEFT",
    *WEIGHTED,
)  # fmt: skip

#: Methods that number the modules as they come in the model.
ORDERED = ("TINYLORA",)
#: Methods whose ``r`` is not a rank.
OTHER_R = ("OFT", "SHIRA", "SUPERTUNING")

_PROMPT = "trains virtual tokens in the old base's hidden space, not weights"
_ACTIVATION = "computes its update from each input: there is no ΔW"
_ROUTES = "mixes several adapters by a router, whose inputs the new base does not have"
#: PEFT type → why there is no update to move.
REFUSED = {
    "ADAMSS": "writes to rows found by clustering the old base's weights, and which rows is not in the file",
    "ADAPTION_PROMPT": _PROMPT,
    "BEFT": "trains biases only",
    "CARTRIDGE": _PROMPT,
    "CPT": _PROMPT,
    "FROD": "writes each weight in a basis made of the weights of all layers, which is not in the file",
    "LILY": _ACTIVATION,
    "LN_TUNING": "trains norm gains only",
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "POLY": _ROUTES,
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "PVERA": "learns a distribution of updates, not one",
    "P_TUNING": _PROMPT,
    "SHADOW": _ACTIVATION,
    "TRAINABLE_TOKENS": "trains token embeddings only: train them with a LoRA (trainable_token_indices)",
    "XLORA": _ROUTES,
}


class Tensors:
    """An adapter's tensors: safetensors, or a pickle file read with ``weights_only=True``.

    Raises:
        CheckpointError: if the file cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    @cached_property
    def _pickled(self) -> dict[str, Tensor]:
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
                raise TypeError("it holds something other than tensors")
        except Exception as error:  # the unpickler raises many kinds, and advises to switch its guard off
            what = f"is damaged, or holds something other than tensors ({type(error).__name__})"
            raise CheckpointError(Problem(str(self.file), what, "Save it again as safetensors.")) from None
        return state

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name → shape."""
        if self.file.suffix == ".bin":
            return {name: tuple(tensor.shape) for name, tensor in self._pickled.items()}
        try:
            with safe_open(self.file, framework="pt") as handle:
                return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        except Exception as error:
            problem = Problem(
                str(self.file), f"is not a readable safetensors file ({error})", "Save or download it again."
            )
            raise CheckpointError(problem) from error

    def tensor(self, name: str) -> Tensor:
        """One tensor in float32 (integers as they are).

        Raises:
            AdapterError: if it holds NaN or Inf.
        """
        if self.file.suffix == ".bin":
            tensor = self._pickled[name]
        else:
            with safe_open(self.file, framework="pt") as handle:
                tensor = handle.get_tensor(name)
        if not tensor.is_floating_point():
            return tensor
        if not bool(torch.isfinite(tensor).all()):
            owner = re.sub(r"\.(lora_|base_layer\.|token_adapter\.).*|\.weight$|\.bias$", "", name.removeprefix(PREFIX))
            problem = Problem(str(self.file), f"{owner} holds NaN or Inf", "Training diverged: train it again.")
            raise AdapterError(problem)
        return tensor.float()


@dataclass(frozen=True, eq=False)
class Update:
    """Where one module's update comes from.

    ``read`` gives the factors ``B (out, r)``, ``A (r, in)`` before scaling, from the old base where it needs that;
    ``shape`` is ``(out, in)``, None where only the old base knows it; ``stored`` tells factors that lie in the file
    from those that take a computation.
    """

    rank: int
    scaling: float
    shape: tuple[int, int] | None
    read: Callable[[Checkpoint | None], tuple[Tensor, Tensor]]
    stored: bool = True


#: Reads from the old base what was added to a module's bias ``(out,)`` float64; None where it has none, or keeps it.
BiasChange = Callable[[Checkpoint], Tensor | None]


@dataclass(frozen=True, eq=False)
class Contents:
    """What an adapter holds, by module path of the base model: updates, changes of biases, names of other tensors.

    ``tokens``: embedding path → its tensor, and the ids its rows stand for.
    """

    updates: dict[str, Update] = field(default_factory=dict)
    magnitudes: dict[str, str] = field(default_factory=dict)
    biases: dict[str, BiasChange] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)


Read = tuple[Contents, list[Problem]]


def read_contents(folder: Path, config: Mapping[str, Any], weights: Tensors) -> Read:
    """Read any adapter whose config has no problems."""
    reader = {"LORA": _lora, "ADALORA": _adalora}.get(kind_of(config), _delta)
    return reader(folder, config, weights)


def kind_of(config: Mapping[str, Any]) -> str:
    """The PEFT type, in capitals."""
    return str(config.get("peft_type") or "").upper()


def config_problems(config: Mapping[str, Any], where: str, initial: bool = False) -> list[Problem]:
    """Everything in an adapter config that is not migrated, by field.

    Args:
        initial: whether the adapter before training lies beside it, against which a changed base can be undone.
    """
    kind = kind_of(config)
    if kind in REFUSED:
        return [Problem(f"{where}: peft_type", f"{kind} {REFUSED[kind]}", "Train a LoRA adapter.")]
    if kind not in ("LORA", "ADALORA", *DELTA):
        return [Problem(f"{where}: peft_type", f"{kind or 'none'} adapters are not supported", "Train a LoRA adapter.")]
    if kind in DELTA:
        return _delta_problems(config, where)
    problems: list[Problem] = []
    for name in ("lora_alpha", "r" if kind == "LORA" else "init_r"):
        value = config.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            problems.append(Problem(f"{where}: {name}", f"is {value!r}", "It must be a positive number."))
    understood = UNDERSTOOD if kind == "LORA" else ADALORA_UNDERSTOOD
    problems += [
        Problem(f"{where}: {name}", REFUSED_FIELDS[name], "Train without it.")
        if name in REFUSED_FIELDS
        else _not_understood(where, name, value)
        for name, value in _set(config)
        if name not in understood
    ]
    if config.get("bias") not in (None, "none", "lora_only"):
        problems.append(
            Problem(
                f"{where}: bias",
                f"{config['bias']!r} also trains biases of modules without an update, whose counterparts are not known",
                "Train with bias='lora_only' or 'none'.",
            )
        )
    if config.get("use_dora") and config.get("bias") not in (None, "none"):
        problems.append(Problem(f"{where}: bias", "is not migrated together with use_dora", "Train without one."))
    init = config.get("init_lora_weights")
    if isinstance(init, str) and CHANGES_BASE.search(init) and not initial and init.lower() not in REPRODUCIBLE:
        problems.append(
            Problem(
                f"{where}: init_lora_weights",
                f"{init!r} changes the base weights before training, in a way that cannot be computed again",
                "Put the adapter saved before training into a folder named *_init inside it, or convert it with PEFT's "
                "save_pretrained(path_initial_model_for_weight_conversion=…).",
            )
        )
    return problems


def _set(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The fields that say anything."""
    return [(name, value) for name, value in config.items() if value not in (None, False, {}, [], "", "none")]


def _not_understood(where: str, name: str, value: Any) -> Problem:
    return Problem(
        f"{where}: {name}", f"{value!r} is not understood", "It may change what the adapter computes, so it is refused."
    )


def _delta_problems(config: Mapping[str, Any], where: str) -> list[Problem]:
    """PEFT reads these itself: what its config class knows is understood, apart from what lies beside ΔW."""
    from dataclasses import fields

    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = kind_of(config)
    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[kind]) if kind in PeftType.__members__ else None
    if cls is None:
        return [Problem(f"{where}: peft_type", f"the installed PEFT has no {kind}", "Install a newer peft.")]
    known = {f.name for f in fields(cls)} | {"megatron_core", "qalora_group_size"}
    problems = [_not_understood(where, name, value) for name, value in _set(config) if name not in known]
    problems += [
        Problem(f"{where}: {name}", f"{value!r} is only migrated beside a LoRA", "Train without it.")
        for name, value in _set(config)
        if name in ("bias", "modules_to_save", "trainable_token_indices")
    ]
    needed = "save_indices" if kind == "UNILORA" else "save_projection"
    if needed in known and not config.get(needed, needed == "save_projection"):
        problems.append(
            Problem(
                f"{where}: {needed}",
                "is false: the random numbers ΔW is made of are not in the file",
                f"Train with {needed}=True.",
            )
        )
    return problems


def initial_adapter(folder: Path) -> Path | None:
    """The adapter as it was before training, kept in ``*_init`` inside the adapter's directory."""
    return next((path.parent for path in sorted(folder.glob(f"*_init/{SAFETENSORS}"))), None)


# ------------------------------------------------------------------------------------------------------------- LoRA

_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.weight)?")
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
_COPY = re.compile(r"(?P<module>.+)\.base_layer\.weight")
_BIAS = re.compile(r"(?P<module>.+?)(\.base_layer)?\.bias")
_SAVED = re.compile(r"(?P<module>.+?)(\.modules_to_save)?\.weight")


def _lora(folder: Path, config: Mapping[str, Any], weights: Tensors) -> Read:
    """LoRA and DoRA: factors as stored; an initialisation that changed the base is undone by a second pair."""
    where, problems = str(weights.file), list[Problem]()
    linear: dict[str, dict[str, str]] = defaultdict(dict)
    embedded: dict[str, dict[str, str]] = defaultdict(dict)
    magnitudes: dict[str, str] = {}
    biases: dict[str, BiasChange] = {}
    saved: dict[str, str] = {}
    tokens: dict[str, tuple[str, tuple[int, ...]]] = {}
    strange: list[str] = []
    for full in weights.shapes:
        name = full.removeprefix(PREFIX) if full.startswith(PREFIX) else ""
        if match := _LORA.fullmatch(name):
            linear[match["module"]][match["side"]] = full
        elif match := _EMBEDDING.fullmatch(name):
            embedded[match["module"]][match["side"]] = full
        elif (match := _MAGNITUDE.fullmatch(name)) and config.get("use_dora"):
            magnitudes[match["module"]] = full
        elif match := _TOKENS.fullmatch(name):
            ids = _token_ids(config.get("trainable_token_indices"), match["module"])
            tokens[match["module"]] = full, ids
            if len(ids) != weights.shapes[full][0]:
                what = f"{match['module']} trains {weights.shapes[full][0]} tokens, the config names {len(ids)}"
                problems.append(Problem(f"{folder / CONFIG}: trainable_token_indices", what, "The two do not belong."))
        elif _COPY.fullmatch(name):
            continue  # the frozen base weight of an embedding, which PEFT stores beside its LoRA
        elif (match := _BIAS.fullmatch(name)) and config.get("bias") == "lora_only":
            biases[match["module"]] = _trained_bias(match["module"], full, weights)
        elif (match := _SAVED.fullmatch(name)) and _is_saved(match["module"], config):
            saved[match["module"]] = full
        else:
            strange.append(full)
    if strange:
        what = f"holds {len(strange)} tensors that are not LoRA factors, such as {strange[0]}"
        problems.append(Problem(where, what, "Only LoRA updates of linear modules and embeddings are migrated."))
    updates: dict[str, Update] = {}
    for module, names in sorted([*linear.items(), *embedded.items()]):
        found = _pair(module, names, module in embedded, config, weights)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            updates[module] = found
    if config.get("use_dora"):
        problems += _dora_problems(str(folder / CONFIG), updates, embedded, magnitudes)
    if not updates and not problems:
        problems.append(Problem(where, "holds no LoRA factors", "There is nothing to migrate."))
    init = config.get("init_lora_weights")
    if not problems and isinstance(init, str) and CHANGES_BASE.search(init):
        undone = _undo_initialisation(folder, init.lower(), updates)
        updates, problems = ({}, undone) if isinstance(undone, list) else (undone, [])
    return Contents(updates, magnitudes, biases, saved, tokens), problems


def _trained_bias(module: str, name: str, weights: Tensors) -> BiasChange:
    def read(base: Checkpoint) -> Tensor:
        return weights.tensor(name).double() - base.tensor(f"{module}.bias").double()

    return read


def _pair(
    module: str, names: Mapping[str, str], embedding: bool, config: Mapping[str, Any], weights: Tensors
) -> Update | Problem:
    where, shapes = str(weights.file), weights.shapes
    if len(names) == 1:
        return Problem(where, f"{module} has only lora_{next(iter(names))}", "The file is damaged.")
    ranks = shapes[names["B"]][1], shapes[names["A"]][0]
    if ranks[0] != ranks[1]:
        what = f"{module} has lora_B of rank {ranks[0]} and lora_A of rank {ranks[1]}"
        return Problem(where, what, "The file is damaged.")

    def read(base: Checkpoint | None) -> tuple[Tensor, Tensor]:
        B, A = weights.tensor(names["B"]), weights.tensor(names["A"])
        # An embedding's weight is (V, d) = (in, out): PEFT adds the transpose of B·A to it.
        return (A.T, B.T) if embedding else (B, A)

    sizes = shapes[names["B"]][0], shapes[names["A"]][1]
    shape = (sizes[1], sizes[0]) if embedding else sizes
    return Update(ranks[0], scaling(config, module, ranks[0]), shape, read)


def _dora_problems(
    where: str, updates: Mapping[str, Update], embedded: Mapping[str, Any], magnitudes: Mapping[str, str]
) -> list[Problem]:
    outside = sorted(module for module in updates if module in embedded or module.endswith("lm_head"))
    problems = [
        Problem(
            f"{where}: use_dora", f"{module} is an embedding, whose magnitudes are not migrated", "Train without it."
        )
        for module in outside
    ]
    lacking = sorted(set(updates) - set(magnitudes) - set(outside))
    if lacking:
        what = f"{len(lacking)} modules have no lora_magnitude_vector, such as {lacking[0]}"
        problems.append(Problem(f"{where}: use_dora", what, "The file is damaged."))
    return problems


def _undo_initialisation(folder: Path, init: str, updates: Mapping[str, Update]) -> dict[str, Update] | list[Problem]:
    """``W_changed + s·B·A = W + s·(B·A − B₀·A₀)``: the trained factors beside the negated initial ones."""
    start = initial_adapter(folder)
    first: Contents | None = None
    if start is not None:
        raw = {**read_json(start / CONFIG), "init_lora_weights": True}
        first, problems = _lora(start, raw, Tensors(start / SAFETENSORS))
        alike = {m: (u.shape, u.scaling) for m, u in updates.items()}
        if not problems and {m: (u.shape, u.scaling) for m, u in first.updates.items()} != alike:
            problems = [Problem(str(start), "updates other modules, or with another scaling", "Give the right one.")]
        if problems:
            return problems

    def undone(module: str, update: Update) -> Update:
        def read(base: Checkpoint | None) -> tuple[Tensor, Tensor]:
            B, A = update.read(base)
            if first is not None:
                B0, A0 = first.updates[module].read(base)
            else:
                B0, A0 = _initial(init, module, update, base)
            return torch.cat([B, -B0], 1), torch.cat([A, A0])

        return Update(2 * update.rank, update.scaling, update.shape, read, stored=first is not None)

    return {module: undone(module, update) for module, update in updates.items()}


def _initial(init: str, module: str, update: Update, base: Checkpoint | None) -> tuple[Tensor, Tensor]:
    """What PiSSA or OLoRA took out of the old base's weight, computed again as PEFT does when it loads one."""
    weight = base_weight(base, module)
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return q[:, : update.rank], r[: update.rank]
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u[:, : update.rank] * (s[: update.rank] / update.scaling), vh[: update.rank]


def _is_saved(module: str, config: Mapping[str, Any]) -> bool:
    return any(module.endswith(name) for name in config.get("modules_to_save") or ())  # as PEFT matches them


def _token_ids(setting: Any, module: str) -> tuple[int, ...]:
    """The ids of a module's trained tokens, in the order of the stored rows."""
    if isinstance(setting, Mapping):
        setting = next((ids for name, ids in setting.items() if module == name or module.endswith(f".{name}")), ())
    return tuple(int(n) for n in setting or ())


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """``α/r``, or ``α/√r`` for rank-stabilised LoRA, with the module's own α where a pattern names it."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def base_weight(base: Checkpoint | None, module: str) -> Tensor:
    """A module's weight in the old base, ``(out, in)`` float32.

    Raises:
        AdapterError: if no base is given, or it has no such module.
    """
    located = None if base is None else base.architecture.locate(module)
    if base is None or located is None:
        raise AdapterError(
            Problem(module, "its update depends on the old base's weight, which is not there", "Give the old base.")
        )
    return base.weight(*located)


def base_bias(base: Checkpoint, module: str) -> Tensor | None:
    """A module's bias ``(out,)`` in the old base, if it has one."""
    name = f"{module}.bias"
    return base.tensor(name) if base.find(name) is not None else None


# ---------------------------------------------------------------------------------------------------------- AdaLoRA

_ADALORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[ABE])")


def _adalora(folder: Path, config: Mapping[str, Any], weights: Tensors) -> Read:
    """``ΔW = α/(r₀ + 10⁻⁵)·B·(E∘A)``: PEFT divides by the rank training began with, whatever was pruned since."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    strange = []
    for full in weights.shapes:
        match = _ADALORA.fullmatch(full.removeprefix(PREFIX)) if full.startswith(PREFIX) else None
        if match:
            found[match["module"]][match["side"]] = full
        elif not full.endswith(".ranknum"):
            strange.append(full)
    problems = [
        Problem(str(weights.file), f"{module} lacks one of lora_A, lora_B and lora_E", "The file is damaged.")
        for module, names in found.items()
        if len(names) < 3
    ]
    if strange:
        what = f"holds {len(strange)} tensors that are not AdaLoRA factors, such as {strange[0]}"
        problems.append(Problem(str(weights.file), what, "Only updates of linear modules are migrated."))
    if not found and not problems:
        problems.append(Problem(str(weights.file), "holds no AdaLoRA factors", "There is nothing to migrate."))
    if problems:
        return Contents(), problems
    alpha = float(config["lora_alpha"]) or float(config["init_r"])
    factor = alpha / (float(config["init_r"]) + 1e-5)

    def update(names: Mapping[str, str]) -> Update:
        (rows, rank), columns = weights.shapes[names["B"]], weights.shapes[names["A"]][1]

        def read(base: Checkpoint | None) -> tuple[Tensor, Tensor]:
            A, B, E = (weights.tensor(names[side]) for side in "ABE")
            if not rank:  # every direction was pruned: one of zeros, so that no transform has to know of rank 0
                return B.new_zeros(rows, 1), A.new_zeros(1, columns)
            return B, A * E

        return Update(max(rank, 1), factor, (rows, columns), read)

    return Contents({module: update(names) for module, names in sorted(found.items())}), []


# -------------------------------------------------------------------------------------- the other methods with a ΔW


def _delta(folder: Path, config: Mapping[str, Any], weights: Tensors) -> Read:
    """ΔW as PEFT computes it, module by module, then its SVD."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    kind = kind_of(config)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType[kind]]
    pattern = re.compile(re.escape(PREFIX) + rf"(?P<module>.+?)\.{re.escape(prefix)}\w+(\..+)?")
    matches = {name: pattern.fullmatch(name) for name in weights.shapes}
    modules = sorted({match["module"] for match in matches.values() if match})
    # Tensors that all modules share lie beside the model: base_model.vera_A.
    strange = [name for name, match in matches.items() if not match and name.startswith(PREFIX)]
    problems = []
    if strange:
        what = f"holds {len(strange)} tensors that are not {kind} weights, such as {strange[0]}"
        problems.append(Problem(str(weights.file), what, "Only updates of linear modules are migrated."))
    if not modules:
        problems.append(Problem(str(weights.file), f"holds no {kind} weights", "There is nothing to migrate."))
    if problems:
        return Contents(), problems
    reader = DeltaReader(
        config, () if kind in ORDERED else modules, list(weights.shapes), weights.tensor, str(weights.file)
    )
    weighted, biased = needs_weights(config), kind in BIASED
    rank = int((kind not in OTHER_R and config.get("r")) or DEFAULT_RANK)

    def update(module: str) -> Update:
        def read(base: Checkpoint | None) -> tuple[Tensor, Tensor]:
            if base is None:
                what = f"what a {kind} adapter adds to it is only known with the old base's shapes"
                raise AdapterError(Problem(module, what, "Give the old base."))
            weight = base_weight(base, module) if weighted else None
            bias = base_bias(base, module) if biased else None
            if kind in ORDERED and not reader.modules:
                place = module_order(base)
                reader.modules = tuple(sorted(modules, key=lambda path: place.get(path, 0)))
            found = reader.read(module, lambda path: weight_shape(base, path), weight, bias)
            return found.B, found.A

        return Update(rank, 1.0, None, read, stored=False)

    def bias_change(module: str) -> BiasChange:
        def read(base: Checkpoint) -> Tensor | None:
            bias = base_bias(base, module)
            return None if bias is None else reader.bias_change(module, base_weight(base, module), bias)

        return read

    biases = {module: bias_change(module) for module in modules} if biased else {}
    return Contents({module: update(module) for module in modules}, biases=biases), []


def weight_shape(base: Checkpoint, module: str) -> tuple[int, int]:
    """``(out, in)`` of a block's module, from the header alone.

    Raises:
        AdapterError: if the base has no such module.
    """
    located = base.architecture.locate(module)
    if located is None:
        raise AdapterError(Problem(module, "is not a linear module of the old base", "Give the right --old-base."))
    rows, columns = base.shape(base.architecture.path(*located) + ".weight")
    return (columns, rows) if located[1].transposed else (rows, columns)
