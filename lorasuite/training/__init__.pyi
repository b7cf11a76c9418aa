from ._device import base_dtype
from ._distillation import SoftLabels, distilled_losses, soft_labels
from ._effort import EXTENTS, Effort, Extent, Search, SearchedArm
from ._finetune import finetune
from ._head import LabelHead, label_rows
from ._loss import LabelLogits, collate, read_labels, validation_loss
from ._search import Start, search
from ._selection import NOTHING, Candidate, choose, write_scaled
from ._settings import FinetuneResult, FinetuneSettings
from ._starts import start_problems
from ._sweep import TriedRate, finetune_swept, loss_order, screen

__all__ = [
    "EXTENTS",
    "NOTHING",
    "Candidate",
    "Effort",
    "Extent",
    "FinetuneResult",
    "FinetuneSettings",
    "LabelHead",
    "LabelLogits",
    "Search",
    "SearchedArm",
    "SoftLabels",
    "Start",
    "TriedRate",
    "base_dtype",
    "choose",
    "collate",
    "distilled_losses",
    "finetune",
    "finetune_swept",
    "label_rows",
    "loss_order",
    "read_labels",
    "screen",
    "search",
    "soft_labels",
    "start_problems",
    "validation_loss",
    "write_scaled",
]
