"""Whether the adapter answers its own rows better than the bare old base does, and under which template most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field

from lorasuite.data import Row, Template, known_templates
from lorasuite.teacher._worth import MIN_CHANGE, TextLoss

#: Rows that templates are tried on, and the least that say anything.
ROWS, MIN_ROWS = 16, 4
#: Standard errors that a difference must be from zero to be called clear.
ERRORS = 2.0
#: Name of rows that no template of this project renders: conversations, by the tokenizer's chat template.
AS_GIVEN = "chat template"


class TemplateFit(BaseModel):
    """The losses on the answers of some rows under one template, in bits per byte."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    old: float = Field(description="of the bare old base")
    adapter: float = Field(description="of the old base with the adapter")
    gain: float = Field(description="old − adapter")
    error: float = Field(description="standard error of the gain over the rows")

    @property
    def clear(self) -> bool:
        """Whether the adapter is clearly better than the bare base."""
        return self.gain >= MIN_CHANGE * max(self.old, 1.0) and self.gain > ERRORS * self.error


class TemplateFits(BaseModel):
    """What :func:`judge_templates` found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    used: str = Field(description="the template in use")
    best: str = Field(description="the one under which the adapter gains most")
    rows: int
    fits: dict[str, TemplateFit] = Field(description="by template, best first")
    warning: str | None = None


def candidates(rows: Sequence[Row], used: Template) -> dict[str, str]:
    """The templates to try on rows, by name: the one in use and, for instruction rows, those that are known."""
    if not any(row.kind == "instruction" for row in rows):
        return {AS_GIVEN: ""}
    return {**known_templates(), used.label: used.text}


def rendered(rows: Sequence[Row], name: str, text: str) -> list[Row]:
    """The rows under one of the :func:`candidates`; the default one renders as any other here, to be compared with it.

    Raises:
        DataError: if the template refuses a row.
    """
    if name == AS_GIVEN:
        return [row for row in rows if row.kind == "messages"]
    template = Template(name, text)
    return template.apply_all([row for row in rows if row.kind == "instruction"])


def judge_templates(
    losses: Mapping[str, tuple[Sequence[TextLoss | None], Sequence[TextLoss | None]]], used: str
) -> TemplateFits | None:
    """Which template fits an adapter: under which its loss on the answers falls most below the bare base's.

    A warning says where the one in use does not make the adapter clearly better than the base, and where another one
    makes it better by more, beyond chance, and the adapter's own loss less.

    Args:
        losses: by template, of the bare old base and of the old base with the adapter, on the same rows.
        used: the template in use, one of them.

    Returns:
        None where fewer than :data:`MIN_ROWS` rows can be read whole under every template.
    """
    pairs = [found for both in losses.values() for found in both]
    whole = [n for n, found in enumerate(zip(*pairs, strict=True)) if None not in found]
    if len(whole) < MIN_ROWS:
        return None
    gains: dict[str, list[float]] = {}
    fits = {}
    size = [_known(losses[used][0][n]).bytes for n in whole]
    for name, (old, adapter) in losses.items():
        bits = [[_known(found[n]).nats / math.log(2) for n in whole] for found in (old, adapter)]
        gains[name] = [a - b for a, b in zip(*bits, strict=True)]
        gain, error = _ratio(gains[name], size)
        fits[name] = TemplateFit(old=sum(bits[0]) / sum(size), adapter=sum(bits[1]) / sum(size), gain=gain, error=error)
    ordered = dict(sorted(fits.items(), key=lambda item: -item[1].gain))
    best = next(iter(ordered))
    more, error = _ratio([a - b for a, b in zip(gains[best], gains[used], strict=True)], size)
    better = more > ERRORS * error and more >= MIN_CHANGE * max(fits[used].old, 1.0)
    better = better and fits[best].adapter < fits[used].adapter and fits[best].clear
    warning = _warning(fits, used, best, better)
    return TemplateFits(used=used, best=best, rows=len(whole), fits=ordered, warning=warning)


def _warning(fits: Mapping[str, TemplateFit], used: str, best: str, better: bool) -> str | None:
    """What the user is told, if anything."""
    mine, other = fits[used], fits[best]
    if mine.clear and not better:
        return None
    shown = f"{mine.adapter:.3f} against {mine.old:.3f} bits per byte"
    where = "by the chat template in use" if used == AS_GIVEN else f"under the template {used}"
    if mine.clear:
        said = f"{where} the old base with the adapter answers its rows better than without ({shown})"
    else:
        said = f"{where} the old base with the adapter is not clearly better than without on its own rows ({shown})"
    if better:
        said += f"; it fits {best} best ({other.adapter:.3f} against {other.old:.3f}): give --template {best}"
        return said
    if used == AS_GIVEN:
        return said + ": it may have been trained with another one, or on other rows"
    return said + ", nor is it by a known one: give the template it was trained with as a Jinja file (--template)"


def _known(loss: TextLoss | None) -> TextLoss:
    assert loss is not None
    return loss


def _ratio(values: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    """``Σ values / Σ sizes`` over rows, and its standard error (of a ratio of means, by linearisation)."""
    n, total = len(values), sum(sizes)
    ratio = sum(values) / total
    spread = sum((value - ratio * size) ** 2 for value, size in zip(values, sizes, strict=True))
    return ratio, math.sqrt(spread * n / (n - 1)) / total
