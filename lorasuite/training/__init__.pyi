from ._device import base_dtype, plan_device
from ._distillation import OUTCOMES_KEPT, SoftLabels, held_out_divergence, soft_labels
from ._effort import EXTENTS, MOST_COMPARED, Effort, Extent, Search, SearchedArm
from ._finetune import finetune
from ._head import LabelHead, cross_entropies, label_rows
from ._loss import LabelLogits, collate, read_labels, validation_loss
from ._on_policy import StepRows
from ._rehearsal import LABELLED, OWN_TEXTS, OWN_TOKENS, rehearsed, texts_beside
from ._search import Start, search
from ._selection import NOTHING, Candidate, choose, write_scaled
from ._settings import EPOCHS, FinetuneResult, FinetuneSettings, SecondStep, SecondStepResult
from ._starts import start_problems
from ._sweep import TriedRate, finetune_swept, loss_order, screen
from ._units import RowAligner
from ._weights import TokenWeights, excess_weights, label_losses

__all__ = [
    "EPOCHS",
    "EXTENTS",
    "LABELLED",
    "MOST_COMPARED",
    "NOTHING",
    "OUTCOMES_KEPT",
    "OWN_TEXTS",
    "OWN_TOKENS",
    "Candidate",
    "Effort",
    "Extent",
    "FinetuneResult",
    "FinetuneSettings",
    "LabelHead",
    "LabelLogits",
    "RowAligner",
    "Search",
    "SearchedArm",
    "SecondStep",
    "SecondStepResult",
    "SoftLabels",
    "Start",
    "StepRows",
    "TokenWeights",
    "TriedRate",
    "base_dtype",
    "choose",
    "collate",
    "cross_entropies",
    "excess_weights",
    "finetune",
    "finetune_swept",
    "held_out_divergence",
    "label_losses",
    "label_rows",
    "loss_order",
    "plan_device",
    "read_labels",
    "rehearsed",
    "screen",
    "search",
    "soft_labels",
    "start_problems",
    "texts_beside",
    "validation_loss",
    "write_scaled",
]
