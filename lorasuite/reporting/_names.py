"""Names of arms, metrics, verdicts and loaders, and how numbers are written for people."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeVar
from urllib.parse import quote

from lorasuite.evaluation import Arm

#: The name of an arm of a migration, or of any adapter that is evaluated.
Name = TypeVar("Name", bound=str)

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
    """A share as a percentage; a whole one without its decimals."""
    return "–" if value is None else f"{100 * value:.{digits}f}".removesuffix(".0") + "\u00a0%"


def seconds(value: float) -> str:
    """A time: seconds, minutes or hours."""
    if value < 60:
        return f"{value:.1f} s" if value >= 0.1 else f"{1000 * value:.0f} ms"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def link(path: str) -> str:
    """A relative path as the address of a link: never one with a scheme, such as ``javascript:``."""
    return quote(path.lstrip("/"), safe="/")


def markdown(text: str) -> str:
    """A name or sentence as plain text of a line of Markdown: nothing in it is markup, HTML or the end of a cell."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_\[\]<>|~$&])", r"\\\1", line)


def code_span(text: str) -> str:
    """A name as a code span of Markdown, in a table too; backticks in it are shown as apostrophes."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return "`" + line.replace("`", "'").replace("|", "\\|") + "`"


def arm_label(arm: str) -> str:
    """The name of an arm of a migration; other names, of adapters that are evaluated, stand for themselves."""
    return next((known.label for known in Arm if known == arm), arm)


def sorted_arms(arms: Iterable[Name]) -> list[Name]:
    """A migration's arms in the order tables list them, then all others as they come."""
    places = {str(arm): place for place, arm in enumerate(Arm)}
    return sorted(arms, key=lambda arm: places.get(str(arm), len(places)))


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % score interval of a share of ``n`` samples (Wilson 1927); defined for shares of 0 and 1, too."""
    from scipy.stats import binomtest

    found = binomtest(round(share * n), n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)
