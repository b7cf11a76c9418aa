"""Changes of embeddings, carried over by the tokens both vocabularies share (docs/adapters.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float64
from torch import Tensor

from lorasuite.adapters import Adapter, Extras, LowRank, vocabulary_side, vocabulary_weight
from lorasuite.bases import Checkpoint, CommonTokens
from lorasuite.correspondence import TransferMatrix
from lorasuite.errors import AdapterError, Problem


@dataclass(eq=False)
class Embeddings:
    """The moved embeddings: updates by path of the new base, the rest, and one row a thing carried or dropped."""

    updates: dict[str, LowRank] = field(default_factory=dict)
    extras: Extras = field(default_factory=Extras)
    carried: list[dict[str, object]] = field(default_factory=list)
    dropped: list[dict[str, str]] = field(default_factory=list)


def move_embeddings(
    adapter: Adapter, old: Checkpoint, new: Checkpoint, common: CommonTokens | None, transfer: TransferMatrix
) -> Embeddings:
    """Carry every change of an embedding over by the shared tokens: ``ΔE_n[new id] = ΔE_o[old id]·W_h``.

    What is carried is always the change against the old base, never an absolute row, so a token that only one of the
    vocabularies has keeps the new base's own row.

    Raises:
        AdapterError: if it changes embeddings and ``common`` is not given, or no token is shared.
    """
    result = Embeddings()
    paths = adapter.vocabulary_modules(old.architecture)
    if not paths:
        return result
    if common is None or not len(common):
        raise AdapterError(
            Problem(str(adapter.path), "changes embeddings, and the vocabularies share no token", "Train without them.")
        )
    for path in paths:
        side = vocabulary_side(old.architecture, path)
        target = new.architecture.embedding if side == "input" else new.architecture.unembedding
        scale = _scale(old, new) if side == "input" else 1.0
        rows = new.shape(vocabulary_weight(new, target))[0]
        if path in adapter.contents.updates:
            update = adapter.update(path, old)
            if _account(result, path, target, "LoRA", update.B, common):
                B = torch.zeros(rows, update.rank, dtype=torch.float64)
                B[common.new] = update.B[common.old]
                result.updates[target] = LowRank(B, transfer.forward(update.A) * scale)
        if path in adapter.contents.saved:
            change = adapter.extra(adapter.contents.saved[path]) - old.tensor(vocabulary_weight(old, path)).double()
            if _account(result, path, target, "modules_to_save", change, common):
                whole = new.tensor(vocabulary_weight(new, target)).double()
                whole[common.new] += transfer.forward(change[common.old]) * scale
                result.extras.saved[target] = whole.float()
    for path, target, name, ids in _tokens_by_place(adapter, old, new, result):
        scale = _scale(old, new) if target == new.architecture.embedding else 1.0
        _move_tokens(result, target, adapter.extra(name), ids, common, transfer, scale, old, new, path)
    return result


def _tokens_by_place(
    adapter: Adapter, old: Checkpoint, new: Checkpoint, result: Embeddings
) -> list[tuple[str, str, str, tuple[int, ...]]]:
    """Trained tokens as ``(old path, new path, tensor, ids)``.

    In a base with tied embeddings PEFT lets tokens trained in the input embedding count in the output one, too.
    """
    a, b, tokens = old.architecture, new.architecture, adapter.contents.tokens
    tied = new.architecture.tied(new.config)
    sides = {vocabulary_side(a, path): path for path in tokens}
    found = [(path, b.embedding if side == "input" else b.unembedding, *tokens[path]) for side, path in sides.items()]
    if "input" in sides and "output" in sides and tied:
        why = "the new base ties its embeddings: a token has one row in both, and the input's change is the one moved"
        result.dropped.append({"module": sides["output"], "why": why})
        return [row for row in found if row[1] == b.embedding]
    if set(sides) == {"input"} and old.architecture.tied(old.config) and not tied:
        return [*found, (a.unembedding, b.unembedding, *tokens[sides["input"]])]
    return found


def _scale(old: Checkpoint, new: Checkpoint) -> float:
    """``W_h`` maps what the first blocks read; rows are stored before the family's scaling of them."""
    return old.architecture.scale(old.config) / new.architecture.scale(new.config)


def _carried(path: str, what: str, rows: int, of: int) -> dict[str, object]:
    return {"module": path, "what": what, "rows": rows, "of": of}


def _account(
    result: Embeddings, path: str, target: str, what: str, change: Float64[Tensor, "V _"], common: CommonTokens
) -> bool:
    """Say how many of the rows that training changed are carried, and which have no token to go to.

    Rows of the latter are tokens of the old vocabulary alone, or tokens of the adapter's own in the spare rows of a
    padded embedding.

    Returns:
        whether any is carried: an embedding without would be the new base's own.
    """
    changed = (change != 0).any(dim=1)
    shared = torch.zeros_like(changed)
    shared[common.old] = True
    kept, of = int((changed & shared).sum()), int(changed.sum())
    lost = (changed & ~shared).nonzero()[:, 0].tolist()
    if lost:
        result.dropped.append(_not_shared(path, lost, of))
    elif not of:
        result.dropped.append({"module": path, "why": f"{what}: every row is the old base's own"})
    if kept:
        result.carried.append(_carried(target, what, kept, of))
    return bool(kept)


def _not_shared(path: str, lost: Sequence[int], of: int) -> dict[str, str]:
    """What is said of trained tokens that the new vocabulary has no place for."""
    why = f"{len(lost)} of its {of} trained tokens are not in the new vocabulary, such as id {lost[0]}"
    return {"module": path, "why": why}


def _move_tokens(
    result: Embeddings,
    target: str,
    rows: Float64[Tensor, "tokens d_o"],
    ids: tuple[int, ...],
    common: CommonTokens,
    transfer: TransferMatrix,
    scale: float,
    old: Checkpoint,
    new: Checkpoint,
    path: str,
) -> None:
    partner = dict(zip(common.old.tolist(), common.new.tolist(), strict=True))
    kept = [(row, id_, partner[id_]) for row, id_ in enumerate(ids) if id_ in partner]
    lost = [id_ for id_ in ids if id_ not in partner]
    if lost:
        result.dropped.append(_not_shared(path, lost, len(ids)))
    if not kept:
        return
    before = old.tensor(vocabulary_weight(old, path))
    after = new.tensor(vocabulary_weight(new, target))
    kept.sort(key=lambda item: item[2])
    change = torch.stack([rows[row] - before[id_].double() for row, id_, _ in kept])
    values = torch.stack([after[n].double() for _, _, n in kept]) + transfer.forward(change) * scale
    result.extras.tokens[target] = [n for _, _, n in kept], values.float()
    what = "trainable tokens"
    if target == new.architecture.embedding and new.architecture.tied(new.config):
        what += " (in the output embedding, too: the new base ties them)"
    result.carried.append(_carried(target, what, len(kept), len(ids)))
