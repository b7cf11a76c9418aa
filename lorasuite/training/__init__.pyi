from ._device import base_dtype
from ._distillation import SoftLabels, distilled_loss, soft_labels
from ._finetune import finetune
from ._loss import collate, read_batches, validation_loss
from ._selection import NOTHING, Candidate, choose, write_scaled
from ._settings import FinetuneResult, FinetuneSettings
from ._sweep import TriedRate, finetune_swept, loss_order, screen

__all__ = [
    "NOTHING",
    "Candidate",
    "FinetuneResult",
    "FinetuneSettings",
    "SoftLabels",
    "TriedRate",
    "base_dtype",
    "choose",
    "collate",
    "distilled_loss",
    "finetune",
    "finetune_swept",
    "loss_order",
    "read_batches",
    "screen",
    "soft_labels",
    "validation_loss",
    "write_scaled",
]
