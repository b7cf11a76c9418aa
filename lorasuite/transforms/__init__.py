"""Transforms: each takes a LoRA update of the old base to one for the new base. One module a transform."""

from lorasuite.transforms import copy, lorasuite
from lorasuite.transforms.base import LayerPair, Transform, names, transform

__all__ = ["LayerPair", "Transform", "copy", "lorasuite", "names", "transform"]
