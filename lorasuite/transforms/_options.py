"""The choices that settings name, apart from what computes with them: reading settings loads no torch."""

from __future__ import annotations

from typing import Literal

#: What becomes of new layers without a partner: left out of the adapter, or given a fresh LoRA.
Unmapped = Literal["freeze", "train"]
