"""lorasuite: migrate LoRA adapters from an old base model to a new one.

Notation, used in every module of this package (PyTorch/PEFT orientation: a weight is ``(out, in)``, ``y = W x``):

====  =====================================================
o, n  suffix: old base model, new base model
d     hidden size
i     intermediate (MLP) size
H, K  attention heads, key/value heads
e     head size
L     layers
V     vocabulary size
r     LoRA rank
====  =====================================================

An adapter's update of one weight is ``ΔW = s·B·A`` with ``B (out, r)``, ``A (r, in)`` and ``s`` the LoRA scaling.
"""

__version__ = "0.1.0"

#: Version of the migration algorithm as a whole; written to ``migration.json``.
ALGORITHM_VERSION = 1
