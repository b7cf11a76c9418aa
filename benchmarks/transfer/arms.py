"""The arms of the transfer benchmark and their grid."""

from __future__ import annotations

METHODS = ("copy", "lorasuite", "procrustes", "functional", "functional-ridge", "sequential")
TRANSFORMED = ("lorasuite", "procrustes", "functional", "sequential")
DATA_DRIVEN = ("eva", "lora-ga", "pissa")
#: Refreshed from a transform's adapter in place of a fresh LoRA.
STARTED = {f"{method}+refresh": method for method in ("procrustes", "functional", "sequential")}
WRITTEN = {"refresh": 300, "refresh-1000": 1000, "refresh-10000": 10_000, **dict.fromkeys(STARTED, 300)}
#: What the command line does by itself: whether it has written rows.
AUTOMATIC = {"auto": False, "auto+refresh": True, "default": True}
#: The same start on the labelled rows alone, but trained for as many steps as the refresh.
LONG = {f"{arm}-long": arm for arm in ("scratch", "procrustes", "functional", "sequential")}
#: What an arm starts from, where its name says more than that.
START = {**LONG, **STARTED}
ARMS = ("scratch", *LONG, *DATA_DRIVEN, *TRANSFORMED, *WRITTEN, *AUTOMATIC)
RATES = (1e-3, 3e-3, 1e-2)
LOWEST, HIGHEST = 1e-4, 1e-1
EPOCHS = (12, 3, 1)
BATCH = 16
PROMPTS, VALIDATION, TEST = 320, 100, 500
