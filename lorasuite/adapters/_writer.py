"""Updates written as a PEFT adapter that ``PeftModel.from_pretrained`` loads whole."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorasuite.adapters._attachment import without_old_names
from lorasuite.adapters._base_modules import vocabulary_side
from lorasuite.adapters._files import CONFIG, PREFIX, WEIGHTS, Tensors
from lorasuite.adapters._kinds import OutputType, kind_of
from lorasuite.adapters._lowrank import LowRank
from lorasuite.adapters._stacked import by_parameter, patterns, stack, tensor_names
from lorasuite.bases import Architecture, Dimensions, auto_class
from lorasuite.errors import AdapterError, Problem


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
    experts: int = 0,
) -> Path:
    """Write updates as a PEFT adapter directory.

    Args:
        updates: module path → update ``(out, in)``, of an embedding ``(V, d)``, cut to ``rank``; the scaling is divided
            out of the factors. Those of experts (``…experts.3.down_proj``) are stacked, and may be of a higher rank.
        extra: module path → ``(B, A)`` to store as they are (fresh initialisations of layers without a partner).
        extras: what lies beside the updates.
        output_type: ``adalora`` writes each update as its SVD, every module with the rank it has.
        experts: how many a layer of the base has, where some have updates.

    Raises:
        AdapterError: if there are updates and every one is zero (an adapter that does nothing), or one holds NaN or
            Inf, or the output type cannot hold it.
    """
    beside, fresh = extras or Extras(), extra or {}
    sizes = {path: update.norm() for path, update in updates.items()}
    problems = [
        Problem(path, "its migrated update holds NaN or Inf", "Try another method.")
        for path, size in sizes.items()
        if not math.isfinite(size)
    ]
    if not problems and not sum(sizes.values()) > 0 and (updates or not fresh):
        problems.append(Problem("adapter", "every migrated update is zero", "It would do nothing: it is not written."))
    if output_type == "adalora":
        outside = [path for path in updates if vocabulary_side(architecture, path)]
        problems += not_in_adalora(outside or beside.saved or beside.tokens, beside.magnitudes, beside.biases)
        problems += not_of_experts(updates, architecture)
    if problems:
        raise AdapterError(problems)
    stacked = by_parameter(updates, architecture)
    updates = {path: update for path, update in updates.items() if architecture.locate_expert(path) is None}
    if output_type == "adalora":
        tensors, own = _adalora_tensors(updates, fresh, rank, alpha)
    else:
        scaling = alpha / math.sqrt(rank) if use_rslora else alpha / rank
        tensors = {**beside.tensors(), **_lora_tensors(updates, fresh, rank, scaling, architecture)}
        ranks = {path: max(rank, *(part.rank for part in parts.values())) for path, parts in stacked.items()}
        for path, parts in stacked.items():
            roots = {number: part.scaled(1 / scaling) for number, part in parts.items()}
            names = (PREFIX + name for name in tensor_names(list(stacked), path))
            values = (value.float().contiguous() for value in stack(roots, experts, ranks[path]))
            tensors |= dict(zip(names, values, strict=True))
        own = {"r": rank, "use_rslora": use_rslora, **beside.settings(), **patterns(ranks, rank, alpha, use_rslora)}
    from peft import AdaLoraConfig, LoraConfig, TaskType

    weights = [path for path in updates if architecture.as_parameter(path)]
    if stacked or weights:
        own["target_parameters"] = sorted([*stacked, *(f"{path}.weight" for path in weights)])
    targets, layers = target_modules(sorted({*updates, *fresh} - {*weights}), architecture, dims)
    config = (AdaLoraConfig if output_type == "adalora" else LoraConfig)(
        lora_alpha=alpha if alpha != int(alpha) else int(alpha),
        target_modules=targets,
        layers_to_transform=layers,
        fan_in_fan_out=fan_in_fan_out(architecture),
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
    """Factors by PEFT's names; each gets the root of the scaling divided out."""
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


def not_of_experts(updates: Iterable[str], architecture: Architecture) -> list[Problem]:
    """Why updates cannot be written as AdaLoRA, where some are of experts: PEFT's adapts no parameters."""
    if not any(architecture.locate_expert(path) for path in updates):
        return []
    return [Problem("output_type", "AdaLoRA has no place for updates of experts", "Use --output-type lora.")]


def fan_in_fan_out(architecture: Architecture) -> bool:
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
    if not by_layer and not embeddings:
        return [], None  # of experts alone
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
    with torch.device("meta"), without_old_names():
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
