from ._distillation import SoftLabels, distilled_loss, soft_labels
from ._finetune import finetune
from ._loss import collate, read_batches, validation_loss
from ._selection import NOTHING, choose, write_scaled
from ._settings import FinetuneResult, FinetuneSettings
from ._sweep import FEWEST, finetune_swept, order, screen

__all__ = [
    "FEWEST",
    "NOTHING",
    "FinetuneResult",
    "FinetuneSettings",
    "SoftLabels",
    "choose",
    "collate",
    "distilled_loss",
    "finetune",
    "finetune_swept",
    "order",
    "read_batches",
    "screen",
    "soft_labels",
    "validation_loss",
    "write_scaled",
]
