"""Which new layer continues which old layer (LoRASuite, arXiv 2505.13515, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from lorasuite.correspondence._options import Strategy
from lorasuite.errors import ConfigError, NumericalError, Problem, did_you_mean
from lorasuite.stored import Stored


def map_layers(
    similarity: Float[Tensor, "L_o L_n"], strategy: str = "dp", max_offset: int | None = None
) -> dict[int, int]:
    """A strictly increasing map of the shorter model's layers into the longer model's, given as ``{old: new}``.

    Args:
        similarity: ``S``, larger is more alike.
        strategy: one of :data:`Strategy`. ``dp`` maximises the summed similarity with layer ``k`` sent to some ``j``,
            ``k ≤ j ≤ k + Δ``; ``first``, ``middle`` and ``last`` take a contiguous block of the longer model (the
            paper's ablation).
        max_offset: Δ, at most and by default ``|L_o − L_n|``.

    Raises:
        ConfigError: for an unknown strategy or an offset outside ``0 … |L_o − L_n|``.
        NumericalError: for a similarity that is NaN or Inf.
    """
    if strategy not in get_args(Strategy):
        raise ConfigError(
            Problem("layer_strategy", f"unknown strategy {strategy!r}", did_you_mean(strategy, get_args(Strategy)))
        )
    if not bool(torch.isfinite(similarity).all()):
        raise NumericalError(
            Problem("similarity", "holds NaN or Inf", "A base model overflowed on the calibration texts: use float32.")
        )
    grow = similarity.shape[0] <= similarity.shape[1]
    table = (similarity if grow else similarity.T).double()
    short, long = table.shape
    slack = long - short
    offset = slack if max_offset is None else max_offset
    if not 0 <= offset <= slack:
        raise ConfigError(
            Problem(
                "max_offset",
                f"{offset} is outside 0 … {slack} (the difference in depth)",
                "Leave it out for Δ.",
            )
        )
    if strategy == "dp":
        path = best_path(table, offset)
    else:
        shift = {"first": 0, "middle": slack // 2, "last": slack}[strategy]
        path = [k + shift for k in range(short)]
    return dict(enumerate(path)) if grow else {j: k for k, j in enumerate(path)}


def best_path(table: Float64[Tensor, "short long"], offset: int) -> list[int]:
    """Dynamic programming with backtracking: ``j_0 < j_1 < …``, ``k ≤ j_k ≤ k + offset``, maximal summed value.

    Written over the shift ``t = j − k``, which may not fall from one layer to the next. Ties go to the smaller shift.
    """
    short = table.shape[0]
    band = torch.stack([table[torch.arange(short), torch.arange(short) + t] for t in range(offset + 1)], 1)
    score = band[0].clone()
    came_from: list[list[int]] = []
    for k in range(1, short):
        best = torch.cummax(score, 0).values
        came_from.append([_first(score[: t + 1] == best[t]) for t in range(offset + 1)])
        score = best + band[k]
    t = _first(score == score.max())
    shifts = [t]
    for sources in reversed(came_from):
        t = sources[t]
        shifts.append(t)
    return [k + t for k, t in enumerate(reversed(shifts))]


def _first(mask: Bool[Tensor, " n"]) -> int:
    return int(mask.nonzero()[0, 0])


@dataclass(frozen=True)
class LayerMap:
    """The chosen map ``{old: new}``, and how alike the layers of each pair are, where that was measured."""

    layers: dict[int, int]
    similarity: dict[int, float] = field(default_factory=dict)

    @classmethod
    def chosen(
        cls, table: Tensor | None, old: int, new: int, strategy: Strategy = "dp", max_offset: int | None = None
    ) -> LayerMap:
        """By :func:`map_layers`; without similarities only strategies that need none, or equal depths.

        Args:
            table: similarities ``(old, new)``, if there are any.
            old: layers of the old base.
            new: layers of the new base.

        Raises:
            ConfigError, NumericalError: as :func:`map_layers`.
        """
        layers = map_layers(torch.zeros(old, new) if table is None else table, strategy, max_offset)
        return cls(layers, {} if table is None else {o: float(table[o, n]) for o, n in layers.items()})

    def info(self) -> dict[str, Any]:
        """The map as JSON data."""
        return {
            "layers": {str(o): n for o, n in self.layers.items()},
            "similarity": {str(o): value for o, value in self.similarity.items()},
        }

    @classmethod
    def read(cls, stored: Stored) -> LayerMap:
        """What :meth:`info` gave."""
        layers = {int(o): n for o, n in stored.info["layers"].items()}
        return cls(layers, {int(o): value for o, value in stored.info["similarity"].items()})
