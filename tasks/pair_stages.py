"""The stages that depend on the pair of base models only: computed once, reused by every adapter.

Inputs named ``…_model`` and ``…_tokenizer`` are fingerprints; the others are artifacts of earlier stages, or of data.
Names of paths: ``old_base``, ``new_base``, and ``base`` where a stage looks at one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lorasuite.bases import CommonTokens, Role, common_tokens
from lorasuite.correspondence import (
    End,
    HeadMaps,
    LayerMap,
    MapKind,
    Metric,
    MlpFactors,
    MlpRole,
    Pooling,
    Strategy,
    TransferMatrix,
    When,
    align,
    align_experts,
    fit_transfer_matrix,
    hidden_states,
    layer_similarity,
    learn_state_map,
    map_heads,
    state_map_tensors,
)
from lorasuite.transforms import map_kind
from tasks.bases import checkpoints, streamed, tokenizers
from tasks.data import stored_texts
from tasks.stage import Artifact, StageOutput, StageSettings, Where, stage


@dataclass(frozen=True, kw_only=True)
class TokenizerInputs:
    """Both tokenizers."""

    old_tokenizer: str
    new_tokenizer: str


class EmbeddingRows(StageSettings):
    """Rows of the two embeddings; ids beyond them have no vector."""

    old_rows: int
    new_rows: int


@stage("vocabulary")
def vocabulary(inputs: TokenizerInputs, settings: EmbeddingRows, where: Where) -> StageOutput:
    """Token ids of the two bases that stand for the same string."""
    common = common_tokens(*tokenizers(where), settings.old_rows, settings.new_rows)
    return StageOutput(common.tensors(), common.info())


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """The weights of both bases."""

    old_model: str
    new_model: str


@dataclass(frozen=True, kw_only=True)
class TransferInputs(ModelInputs):
    """Both bases, and the tokens they share."""

    vocabulary: Artifact


class TransferSettings(StageSettings):
    """Whether ``W_h`` is fitted where the hidden sizes agree."""

    when: When


@stage("transfer_matrices")
def transfer_matrices(inputs: TransferInputs, settings: TransferSettings, where: Where) -> StageOutput:
    """``W_h`` from the embeddings of the common tokens."""
    fitted = fit_transfer_matrix(*checkpoints(where), CommonTokens.read(inputs.vocabulary), settings.when, where.device)
    return StageOutput(fitted.tensors(), fitted.info())


@dataclass(frozen=True, kw_only=True)
class OldModelInputs:
    """The weights of the old base."""

    old_model: str


class RoleSettings(StageSettings):
    """One projection of the MLP."""

    role: MlpRole


@stage("mlp_factors", version=3)
def mlp_factors(inputs: OldModelInputs, settings: RoleSettings, where: Where) -> StageOutput:
    """The factors of one MLP projection's pseudo-inverses, layer by layer, of the old base (for any new one)."""
    old = checkpoints(where)[0]
    return StageOutput(MlpFactors.tensors(old, settings.role, where.device), MlpFactors.info(old))


@dataclass(frozen=True, kw_only=True)
class ReadingInputs:
    """One base, and the texts it reads."""

    model: str
    tokenizer: str
    texts: Artifact


class ReadingSettings(StageSettings):
    """How texts are read, and what is kept of each."""

    cutoff: int
    pooling: Pooling


@stage("activations", version=2)
def activations(inputs: ReadingInputs, settings: ReadingSettings, where: Where) -> StageOutput:
    """One base's hidden states of the calibration texts, pooled by example."""
    with streamed(where, "base") as base:
        pooled = hidden_states(base, stored_texts(inputs.texts), cutoff=settings.cutoff, pooling=settings.pooling)
    return StageOutput({"pooled": pooled}, {"layers": pooled.shape[0], "texts": pooled.shape[1]})


@dataclass(frozen=True, kw_only=True)
class PooledInputs:
    """Both bases' pooled hidden states."""

    old: Artifact
    new: Artifact


class SimilaritySettings(StageSettings):
    """The metric, and for CKA the examples of a minibatch (else 0)."""

    metric: Metric
    batch_size: int


@stage("similarity")
def similarity(inputs: PooledInputs, settings: SimilaritySettings, where: Where) -> StageOutput:
    """How alike every old layer is to every new one: minibatch CKA, or another metric."""
    old, new = inputs.old.tensor("pooled"), inputs.new.tensor("pooled")
    table = layer_similarity(old, new, settings.metric, settings.batch_size)
    return StageOutput({"similarity": table}, {"metric": settings.metric, "mean": float(table.mean())})


@dataclass(frozen=True, kw_only=True)
class SimilarityInputs:
    """The similarities, where there are any."""

    similarity: Artifact | None = None


class LayerMappingSettings(StageSettings):
    """How layers are mapped, and how many there are in each base."""

    strategy: Strategy
    max_offset: int | None
    old: int
    new: int


@stage("layer_mapping")
def layer_mapping(inputs: SimilarityInputs, settings: LayerMappingSettings, where: Where) -> StageOutput:
    """The layer map; without similarities only the strategies that need none, or equal depths."""
    known = None if inputs.similarity is None else inputs.similarity.tensor("similarity")
    found = LayerMap.chosen(known, settings.old, settings.new, settings.strategy, settings.max_offset)
    return StageOutput(info=found.info())


@dataclass(frozen=True, kw_only=True)
class HeadMappingInputs(ModelInputs):
    """Both bases, the layer map, and ``W_h``."""

    layer_mapping: Artifact
    transfer_matrices: Artifact


class HeadMappingSettings(StageSettings):
    """Whether heads are matched by similarity; else head a goes to head a."""

    matching: bool


@stage("head_mapping", version=2)
def head_mapping(inputs: HeadMappingInputs, settings: HeadMappingSettings, where: Where) -> StageOutput:
    """Matched heads of every mapped layer pair."""
    layers = LayerMap.read(inputs.layer_mapping).layers
    transfer = TransferMatrix.read(inputs.transfer_matrices)
    found = HeadMaps.matched(map_heads(*checkpoints(where), layers, transfer, settings.matching, device=where.device))
    return StageOutput(found.tensors(), found.info())


@dataclass(frozen=True, kw_only=True)
class PairReadingInputs(ModelInputs, TokenizerInputs):
    """Both bases, and the texts they read."""

    texts: Artifact


@dataclass(frozen=True, kw_only=True)
class AlignmentInputs(PairReadingInputs):
    """Both bases, the texts they read, and which of their layers go together."""

    layer_mapping: Artifact


class RolesSettings(StageSettings):
    """The projections that are looked at, and the tokens read of a text."""

    roles: tuple[Role, ...]
    cutoff: int


class MapSettings(StageSettings):
    """The tokens read of a text, kinds of map by name, of what projections read and write, and the positions that wide
    spaces are mapped by."""

    cutoff: int
    read: tuple[str, ...]
    written: tuple[str, ...]
    positions: int


class AlignmentSettings(RolesSettings, MapSettings):
    """The same, and the projections that are looked at."""


@stage("alignment", version=3)
def alignment(inputs: AlignmentInputs, settings: AlignmentSettings, where: Where) -> StageOutput:
    """Maps between what mapped modules of both bases read and write at positions that have read the same text."""
    return _maps(inputs, settings, where, partial(align, roles=settings.roles))


@stage("expert_maps")
def expert_maps(inputs: AlignmentInputs, settings: MapSettings, where: Where) -> StageOutput:
    """Which experts of mapped layers are routed the same tokens, and maps between what those read and write."""
    return _maps(inputs, settings, where, align_experts)


def _maps(inputs: AlignmentInputs, settings: MapSettings, where: Where, fit: Callable[..., Any]) -> StageOutput:
    """What ``fit`` finds between both bases, a tensor at a time.

    Args:
        fit: :func:`align_experts`, or a function of the same arguments.
    """
    layers = LayerMap.read(inputs.layer_mapping).layers
    kinds: dict[End, list[MapKind]] = {
        "in": [map_kind(name) for name in settings.read],
        "out": [map_kind(name) for name in settings.written],
    }
    info: dict[str, Any] = {}

    def named() -> Iterator[tuple[str, Tensor]]:
        with streamed(where, "old_base") as old, streamed(where, "new_base") as new:
            texts = stored_texts(inputs.texts)
            options = {"positions": settings.positions, "cutoff": settings.cutoff}
            found, known = fit(old, new, layers, texts=texts, kinds=kinds, **options)
            yield from found
            info.update(known)

    return StageOutput(named(), info)


@stage("state_map", version=4)
def state_map(inputs: PairReadingInputs, settings: RolesSettings, where: Where) -> StageOutput:
    """Where the new base stands when the old one stands somewhere, at the same text."""
    info: dict[str, Any] = {}

    def named() -> Iterator[tuple[str, Tensor]]:
        with streamed(where, "old_base") as old, streamed(where, "new_base") as new:
            texts = stored_texts(inputs.texts)
            yield from state_map_tensors(
                *learn_state_map(old, new, settings.roles, texts, cutoff=settings.cutoff), info
            )

    return StageOutput(named(), info)


PAIR_STAGES = (
    vocabulary,
    transfer_matrices,
    mlp_factors,
    activations,
    similarity,
    layer_mapping,
    head_mapping,
    alignment,
    expert_maps,
    state_map,
)
