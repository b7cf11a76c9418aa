"""What two base models do with the same text, module by module: the statistics that the transforms with activations
read.

Rows are token positions of both models that have read the same text up to and including their token. The statistics
are sums over rows, so memory does not grow with the number of texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorasuite.bases import ActivationRecorder, LoadedBase, Role, paired_positions
from lorasuite.correspondence._regression import Moments
from lorasuite.errors import DataError, Problem
from lorasuite.progress import Progress
from lorasuite.stored import Stored


def align(
    old: LoadedBase,
    new: LoadedBase,
    layers: Mapping[int, int],
    roles: Sequence[Role],
    texts: Sequence[str],
    *,
    cutoff: int = 256,
    progress: Progress | None = None,
) -> dict[tuple[int, Role, str], Moments]:
    """Moments of what each mapped module reads (``"in"``) and writes (``"out"``) in both models.

    Args:
        layers: old → new layer.
        roles: those both architectures have.
        cutoff: tokens of a text read at most, in each model.

    Returns:
        ``{(old layer, role, "in" | "out"): moments}``.

    Raises:
        DataError: if no two positions pair.
    """
    found: dict[tuple[int, Role, str], Moments] = {}
    bases = (old, new)
    recorders = _by_role(old, layers), _by_role(new, layers.values())
    with recorders[0], recorders[1]:
        for done, text in enumerate(texts, 1):
            encoded = [
                base.tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=cutoff) for base in bases
            ]
            pairs = paired_positions(*(e["offset_mapping"] for e in encoded))
            if not pairs:
                continue
            text_number = torch.zeros(len(pairs), dtype=torch.long)
            x, y = (
                recorder.read(torch.tensor([e["input_ids"]]), (text_number, torch.tensor(positions)))
                for recorder, e, positions in zip(recorders, encoded, zip(*pairs, strict=True), strict=True)
            )
            for o, n in layers.items():
                for role in roles:
                    for end in ("in", "out"):
                        key = (o, role, end)
                        if key not in x or (n, role, end) not in y:
                            continue
                        if key not in found:
                            found[key] = Moments.empty(x[key].shape[1], y[n, role, end].shape[1])
                        found[key].add(x[key], y[n, role, end])
            if progress is not None:
                progress(done, len(texts))
    if not found:
        raise DataError(
            Problem("calibration", "no position of the two tokenizations pairs", "Give texts of several words.")
        )
    return found


def _by_role(base: LoadedBase, layers: Iterable[int]) -> ActivationRecorder:
    """A recorder of all linear modules of some layers, by role."""
    recorder = ActivationRecorder(base)
    for layer in layers:
        for module in base.architecture.modules:
            recorder.module(layer, module, by_role=True)
    return recorder


#: Spaces wider than this are not looked at: a solve of a space of MLP units costs minutes.
WIDEST = 8192


class Alignment:
    """Moments of what mapped modules of both bases read and write, from artifacts: one space in memory at a time."""

    def __init__(self, stored: Iterable[Stored]) -> None:
        self._holders = {name: one for one in stored for name in one.keys()}  # noqa: SIM118 - not a dict

    def __call__(self, layer: int, role: Role, end: str) -> Moments:
        """The moments of an old layer's role, ``in`` or ``out``."""
        prefix = _space(layer, role, end)
        return Moments.read(prefix, self._holders[f"{prefix}.rows"].tensor)

    @staticmethod
    def tensors(found: Mapping[tuple[int, Role, str], Moments]) -> Iterator[tuple[str, Tensor]]:
        """What :func:`align` found by name, to be stored."""
        for key, moments in found.items():
            yield from moments.tensors(_space(*key))

    def unexplained(self) -> dict[str, Any]:
        """How much of what each new module reads and writes no linear map from the old one's explains, as JSON data.

        ``rows``, and ``residual`` by old layer and space. Spaces of more than :data:`WIDEST` columns are left out.
        """
        spaces = sorted(name.removesuffix(".rows") for name in self._holders if name.endswith(".rows"))
        found: dict[str, dict[str, float]] = {}
        rows = 0
        for name in spaces:
            layer, role, end = name.split(".")
            if end == "in" and role in ("k", "v", "gate"):  # they read what q and up read
                continue
            moments = Moments.read(name, self._holders[f"{name}.rows"].tensor)
            rows = moments.rows
            if max(moments.xy.shape) <= WIDEST:
                found.setdefault(layer, {})[f"{role} {end}"] = round(moments.unexplained(), 4)
        return {"rows": rows, "residual": found}


def _space(layer: int, role: Role, end: str) -> str:
    """The name of a space among stored moments."""
    return f"{layer}.{role}.{end}"
