"""The stages that depend on the pair of base models only: computed once, reused by every adapter.

Names of inputs, the same in every stage: ``old_model``, ``new_model``, ``old_tokenizer``, ``new_tokenizer``,
``calibration`` are fingerprints; the others are earlier stages. Names of paths: ``old_base``, ``new_base``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorasuite.bases import Checkpoint, CommonTokens, LoadedBase, Role, common_tokens, load_model, load_tokenizer
from lorasuite.correspondence import (
    Moments,
    TransferMatrix,
    align,
    fit_transfer_matrix,
    hidden_states,
    layer_similarity,
    learn,
    map_heads,
    map_layers,
    mlp_factor,
    tensors,
)
from lorasuite.data import calibration_texts
from tasks.stage import Artifact, StageOutput, Where, stage

Inputs = Mapping[str, Any]
Settings = Mapping[str, Any]


@stage("vocabulary")
def vocabulary(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """Token ids of the two bases that stand for the same string."""
    old, new = (load_tokenizer(where.path(name), trusted(where)) for name in BASES)
    common = common_tokens(old, new, settings["old_rows"], settings["new_rows"])
    info = {"common": len(common), "same": common.same, "old": common.old_size, "new": common.new_size}
    return StageOutput({"old": common.old, "new": common.new}, info)


@stage("transfer_matrices")
def transfer_matrices(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """``W_h`` from the embeddings of the common tokens."""
    common = shared_tokens(inputs["vocabulary"])
    fitted = fit_transfer_matrix(*_checkpoints(where), common, settings["when"])
    tensors = {} if fitted.matrix is None or fitted.inverse is None else {
        "matrix": fitted.matrix, "inverse": fitted.inverse
    }  # fmt: skip
    return StageOutput(tensors, {"identity": fitted.identity, "residual": fitted.residual, "tokens": fitted.tokens})


@stage("mlp_factors")
def mlp_factors(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """One MLP projection's Gram pseudo-inverses, layer by layer, of the old base (for any new one)."""
    old = Checkpoint(where.path("old_base"))
    role: Any = settings["role"]
    held = (layer for layer in range(old.dims.layers) if role in old.roles(layer))
    return StageOutput((str(layer), mlp_factor(old, layer, role)) for layer in held)


@stage("activations")
def activations(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """One base's hidden states of the calibration texts, pooled by example."""
    path = where.path("base")
    base = side(where, "base", load_model(path, where.device, trust_remote_code=trusted(where)))
    # Chat rows become text through the new base's template, so that both bases read the same texts.
    reader = load_tokenizer(where.path("new_base"), trusted(where))
    texts = calibration_texts(where.path("calibration"), reader)[: settings["samples"]]
    pooled = hidden_states(
        base,
        texts,
        batch_size=int(settings["batch_size"]),
        cutoff=settings["cutoff"],
        pooling=settings["pooling"],
    )
    return StageOutput({"pooled": pooled}, {"layers": pooled.shape[0], "texts": pooled.shape[1]})


@stage("similarity")
def similarity(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """How alike every old layer is to every new one: minibatch CKA, or another metric."""
    old, new = inputs["old"].tensor("pooled"), inputs["new"].tensor("pooled")
    table = layer_similarity(old, new, settings["metric"], settings["batch_size"])
    return StageOutput({"similarity": table}, {"metric": settings["metric"], "mean": float(table.mean())})


@stage("layer_mapping")
def layer_mapping(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """The layer map; without similarities only the strategies that need none, or equal depths."""
    known: Artifact | None = inputs.get("similarity")
    table = torch.zeros(settings["old"], settings["new"]) if known is None else known.tensor("similarity")
    layers = map_layers(table, settings["strategy"], settings["max_offset"])
    values = {} if known is None else {str(o): float(table[o, n]) for o, n in layers.items()}
    return StageOutput(info={"layers": {str(o): n for o, n in layers.items()}, "similarity": values})


@stage("head_mapping")
def head_mapping(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """Matched heads of every mapped layer pair."""
    layers = layer_map(inputs["layer_mapping"])
    found = map_heads(*_checkpoints(where), layers, transfer(inputs["transfer_matrices"]), settings["matching"])
    heads = {str(o): {str(a): b for a, b in match.heads.items()} for o, match in found.items()}
    return StageOutput({str(o): match.similarity for o, match in found.items()}, {"heads": heads})


def trusted(where: Where) -> bool:
    """Whether model repositories may run their own code."""
    return bool(where.options.get("trust_remote_code"))


@stage("alignment")
def alignment(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """What mapped modules of both bases read and write at positions that have read the same text."""
    old, new = (
        side(where, base, load_model(where.path(base), where.device, trust_remote_code=trusted(where)))
        for base in BASES
    )
    found = align(
        old,
        new,
        layer_map(inputs["layer_mapping"]),
        settings["roles"],
        calibration_texts(where.path("calibration"), new.tokenizer)[: settings["samples"]],
        cutoff=settings["cutoff"],
    )
    tensors = (item for key, moments in found.items() for item in moments.tensors(moments_name(*key)))
    return StageOutput(tensors, {"rows": next(iter(found.values())).rows})


def side(where: Where, base: str, model: Any) -> LoadedBase:
    """A loaded base with what is needed to read it."""
    return LoadedBase.of(model, load_tokenizer(where.path(base), trusted(where)), Checkpoint(where.path(base)))


@stage("state_map", version=2)
def state_map(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """Where the new base stands when the old one stands somewhere, at the same text."""
    old, new = (
        side(where, base, load_model(where.path(base), where.device, trust_remote_code=trusted(where)))
        for base in BASES
    )
    texts = calibration_texts(where.path("calibration"), new.tokenizer)[: settings["samples"]]
    info: dict[str, Any] = {}
    learned = learn(old, new, settings["roles"], texts, cutoff=settings["cutoff"])
    return StageOutput(tensors(*learned, info), info)


#: Spaces wider than this are not looked at: a solve of a space of MLP units costs minutes.
WIDEST = 8192


@stage("alignment_fit")
def alignment_fit(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """How much of what each new module reads and writes no linear map from the old one's explains."""
    artifacts = list(inputs.values())
    read = moments_reader(artifacts)
    names = [name.removesuffix(".rows") for a in artifacts for name in a.keys() if name.endswith(".rows")]  # noqa: SIM118
    found: dict[str, dict[str, float]] = {}
    rows = 0
    for name in sorted(names):
        layer, role, end = name.split(".")
        if end == "in" and role in ("k", "v", "gate"):  # they read what q and up read
            continue
        moments = read(int(layer), role, end)
        rows = moments.rows
        if max(moments.xy.shape) <= WIDEST:
            found.setdefault(layer, {})[f"{role} {end}"] = round(moments.unexplained(), 4)
    return StageOutput(info={"rows": rows, "residual": found})


def moments_name(layer: int, role: Role, end: str) -> str:
    """How an alignment artifact names the moments of an old layer's role."""
    return f"{layer}.{role}.{end}"


def moments_reader(artifacts: Sequence[Artifact]) -> Callable[[int, Role, str], Moments]:
    """Reads one role's moments at a time from the alignment artifacts."""
    names = {name: artifact for artifact in artifacts for name in artifact.keys()}  # noqa: SIM118

    def read(layer: int, role: Role, end: str) -> Moments:
        prefix = moments_name(layer, role, end)
        return Moments.read(prefix, names[f"{prefix}.rows"].tensor)

    return read


BASES = ("old_base", "new_base")


def _checkpoints(where: Where) -> tuple[Checkpoint, Checkpoint]:
    return Checkpoint(where.path("old_base")), Checkpoint(where.path("new_base"))


def shared_tokens(artifact: Artifact) -> CommonTokens:
    """The paired ids of a vocabulary artifact."""
    info = artifact.info
    return CommonTokens(artifact.tensor("old"), artifact.tensor("new"), info["same"], info["old"], info["new"])


def layer_map(artifact: Artifact) -> dict[int, int]:
    """``{old: new}`` of a layer_mapping artifact."""
    return {int(o): n for o, n in artifact.info["layers"].items()}


def head_maps(artifact: Artifact) -> dict[int, dict[int, int]]:
    """``{old layer: {old head: new head}}`` of a head_mapping artifact."""
    return {int(o): {int(a): b for a, b in heads.items()} for o, heads in artifact.info["heads"].items()}


def transfer(artifact: Artifact) -> TransferMatrix:
    """The fitted ``W_h`` of a transfer_matrices artifact."""
    info = artifact.info
    if info["identity"]:
        return TransferMatrix(tokens=info["tokens"])
    return TransferMatrix(artifact.tensor("matrix"), artifact.tensor("inverse"), info["residual"], info["tokens"])


def factor_reader(artifacts: Mapping[Role, Artifact]) -> Callable[[int, Role], Tensor]:
    """Reads one MLP factor at a time from the mlp_factors artifacts."""

    def read(layer: int, role: Role) -> Tensor:
        return artifacts[role].tensor(str(layer))

    return read
