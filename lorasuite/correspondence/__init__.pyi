from ._activations import hidden_states
from ._alignment import Alignment, align
from ._head_mapping import HeadMaps, head_similarity, heads, index_heads, map_heads, match_heads
from ._layer_mapping import LayerMap, map_layers
from ._options import Metric, MlpRole, Pooling, Strategy, When
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
from ._similarity import SMALLEST_BATCH, cka, grams, hsic, layer_similarity, minibatch_cka
from ._state_map import (
    AffineMap,
    LayerMaps,
    Reading,
    StateFeatures,
    StateMap,
    learn_state_map,
    modules_of_roles,
    state_map_tensors,
)
from ._transfer_matrix import MlpFactors, TransferMatrix, fit_transfer_matrix, mlp_factor

__all__ = [
    "FIT_RIDGE",
    "RIDGE",
    "SMALLEST_BATCH",
    "AffineMap",
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
    "StateFeatures",
    "StateMap",
    "Strategy",
    "TargetSums",
    "TransferMatrix",
    "When",
    "align",
    "cka",
    "fit_transfer_matrix",
    "grams",
    "head_similarity",
    "heads",
    "hidden_states",
    "hsic",
    "index_heads",
    "layer_similarity",
    "learn_state_map",
    "least_squares",
    "map_heads",
    "map_layers",
    "match_heads",
    "minibatch_cka",
    "mlp_factor",
    "modules_of_roles",
    "reduced_rank",
    "ridge",
    "ridge_factor",
    "state_map_tensors",
]
