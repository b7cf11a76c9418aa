"""The choices that settings name, apart from what computes with them: reading settings loads no torch."""

from __future__ import annotations

from typing import Literal

#: One vector an example: the mean over its tokens, or the last one.
Pooling = Literal["mean", "last"]
#: Layer similarities: minibatch CKA, and the metrics of the paper's ablation.
Metric = Literal["cka", "cca", "pwcca", "procrustes"]
#: Layer maps: the paper's Algorithm 1, and the strategies of its ablation.
Strategy = Literal["dp", "first", "middle", "last"]
#: When ``W_h`` is fitted: only where the hidden sizes differ, always, or never.
When = Literal["auto", "always", "never"]
#: The projections of an MLP.
MlpRole = Literal["gate", "up", "down"]
#: Whether a projection reads a space or writes it.
End = Literal["in", "out"]
#: Sampled positions that wide spaces are mapped by: docs/transfer.md has what fewer and more do.
POSITIONS = 512
#: Features of an old state at most: above it, each space is projected at random onto its share of them.
FEATURES = 2048
#: Principal directions of the features that the state map keeps.
DIRECTIONS = 1200
