"""Transforms: each takes a LoRA update of the old base to one for the new base. One module a transform."""

from lorasuite.transforms import controls, copy, functional, logits, lorasuite, procrustes, sequential
from lorasuite.transforms.base import NO_START, LayerPair, Transform, names, reads_texts, transform

__all__ = [
    "NO_START",
    "LayerPair",
    "Transform",
    "controls",
    "copy",
    "functional",
    "logits",
    "lorasuite",
    "names",
    "procrustes",
    "reads_texts",
    "sequential",
    "transform",
]
