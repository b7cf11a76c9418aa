from ._activations import Pooling, hidden_states
from ._alignment import Alignment, align
from ._head_mapping import HeadMaps, head_similarity, heads, index_heads, map_heads, match_heads
from ._layer_mapping import LayerMap, Strategy, map_layers
from ._regression import (
    FIT_RIDGE,
    RIDGE,
    Moments,
    RegressionSums,
    TargetSums,
    least_squares,
    reduced_rank,
    ridge,
    ridge_factor,
)
from ._similarity import SMALLEST_BATCH, Metric, cka, grams, hsic, layer_similarity, minibatch_cka
from ._state_map import LayerMaps, Reading, StateMap, chosen, learn, tensors
from ._transfer_matrix import MlpFactors, MlpRole, TransferMatrix, When, fit_transfer_matrix, mlp_factor

__all__ = [
    "FIT_RIDGE",
    "RIDGE",
    "SMALLEST_BATCH",
    "Alignment",
    "HeadMaps",
    "LayerMap",
    "LayerMaps",
    "Metric",
    "MlpFactors",
    "MlpRole",
    "Moments",
    "Pooling",
    "Reading",
    "RegressionSums",
    "StateMap",
    "Strategy",
    "TargetSums",
    "TransferMatrix",
    "When",
    "align",
    "chosen",
    "cka",
    "fit_transfer_matrix",
    "grams",
    "head_similarity",
    "heads",
    "hidden_states",
    "hsic",
    "index_heads",
    "layer_similarity",
    "learn",
    "least_squares",
    "map_heads",
    "map_layers",
    "match_heads",
    "minibatch_cka",
    "mlp_factor",
    "reduced_rank",
    "ridge",
    "ridge_factor",
    "tensors",
]
