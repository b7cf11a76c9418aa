"""What arms, metrics, verdicts and loaders are called, and how numbers are written for people."""

from __future__ import annotations

from collections.abc import Iterable

#: Arms of an evaluation in the order they are read, and what they are called.
ARMS = {
    "old": "old base",
    "old+adapter": "old base + adapter",
    "new": "new base",
    "migrated": "migrated, no LFT",
    "scratch-own": "LoRA from scratch, without the written rows",
    "scratch": "LoRA from scratch, same samples",
    "migrated+lft": "migrated + LFT",
}
METRICS = {"exact_match": "exact match", "loss": "loss (nats/token)", "bits_per_byte": "bits per byte"}
#: Half-width of a 95 % interval in standard errors.
Z = 1.96
VERDICT_WORDS = {
    "ship": ("Ship", "good"),
    "needs-finetune": ("Needs fine-tuning", "fair"),
    "retrain": ("Retrain", "poor"),
    "unmeasured": ("Not measured", "none"),
    "failed": ("Failed", "poor"),
}
LOADERS = {"peft": "PEFT", "transformers": "merged, plain transformers", "vllm": "vLLM", "llama.cpp": "llama.cpp"}


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: ``–`` where there is none."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.2g}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage, without a decimal that says nothing."""
    return "–" if value is None else f"{100 * value:.{digits}f}".removesuffix(".0") + "\u00a0%"


def seconds(value: float) -> str:
    """A time: seconds, minutes or hours."""
    if value < 60:
        return f"{value:.1f} s" if value >= 0.1 else f"{1000 * value:.0f} ms"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def _sorted_arms(arms: Iterable[str]) -> list[str]:
    known = list(arms)
    return [*[a for a in ARMS if a in known], *[a for a in known if a not in ARMS]]


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of ``n`` samples (Wilson 1927), which none and all of them have, too."""
    from scipy.stats import binomtest

    found = binomtest(round(share * n), n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)
