"""Figures of the reports, as SVG that takes its colours from the page: light, dark and printed alike.

Every function gives markup with its own text alternative. Classes name roles (``ink``, ``soft``, ``series-1``), which
the page's style sheet colours. Only :func:`heat_map_png`, for dashboards that show pictures alone, uses matplotlib.
"""

from __future__ import annotations

import base64
import functools
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape
from torch import Tensor

#: Cells up to which a heat map writes its numbers.
NUMBERED_CELLS = 120


def heat_map(similarity: Tensor, layers: Mapping[int, int], metric: str = "CKA") -> Markup:
    """Similarity ``(L_o, L_n)`` as shaded cells, with the chosen path over them."""
    table = similarity.float().tolist()
    rows, columns = len(table), len(table[0])
    written = rows * columns <= NUMBERED_CELLS
    cell = 44.0 if written else 26.0 if columns <= 24 else max(8.0, min(16.0, 790 / columns))
    high = cell * (0.7 if written else 1.0)
    left, top = 46.0, 8.0
    width, height = left + columns * cell + 8, top + rows * high + 40
    values = [value for row in table for value in row if math.isfinite(value)] or [0.0]
    low, span = min(0.0, *values), max(1e-9, max(values) - min(0.0, *values))
    parts = []
    deepest = 0.7 if written else 1.0  # numbers must stay readable on every shade
    for o, row in enumerate(table):
        for n, value in enumerate(row):
            x, y = left + n * cell, top + o * high
            shade = deepest * (0.08 + 0.92 * max(0.0, (value - low) / span)) if math.isfinite(value) else 0
            parts.append(
                f'<rect class="heat" x="{x + 0.5:g}" y="{y + 0.5:g}" width="{cell - 1}" height="{high - 1:g}" '
                f'fill-opacity="{shade:.2f}"/>'
            )
            if written and layers.get(o) != n:
                parts.append(_text(x + cell / 2, y + high / 2 + 4, f"{value:.2f}", "middle"))
    path = [(left + (n + 0.5) * cell, top + (o + 0.5) * high) for o, n in sorted(layers.items())]
    parts.append(f'<polyline class="path" points="{" ".join(f"{x:g},{y:g}" for x, y in path)}"/>')
    for (x, y), (o, n) in zip(path, sorted(layers.items()), strict=True):
        if written:
            parts.append(f'<rect class="chosen" x="{x - 17:g}" y="{y - 10:g}" width="34" height="20" rx="10"/>')
            parts.append(_text(x, y + 4, f"{table[o][n]:.2f}", "on-chosen middle"))
        else:
            parts.append(f'<circle class="chosen" cx="{x:g}" cy="{y:g}" r="{min(4.5, high / 3):g}"/>')
    step_n, step_o = max(1, math.ceil(20 / cell)), max(1, math.ceil(16 / high))
    parts += [
        _text(left + (n + 0.5) * cell, top + rows * high + 16, str(n), "soft middle") for n in range(0, columns, step_n)
    ]
    parts += [_text(left - 8, top + (o + 0.5) * high + 4, str(o), "soft end") for o in range(0, rows, step_o)]
    parts.append(_text(left + columns * cell / 2, top + rows * high + 34, "new layer", "soft middle"))
    middle = top + rows * high / 2
    parts.append(f'<text class="soft middle" transform="translate(14 {middle:g}) rotate(-90)">old layer</text>')
    told = ", ".join(f"{o} to {n}" for o, n in sorted(layers.items()))
    title = f"{metric} of each of {rows} old layers with each of {columns} new ones; chosen path: {told}"
    return _svg(width, height, title, parts, "wide")


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> Markup:
    """Lines by name over a common axis, each named at its end; at most four are told apart."""
    width, height, left, right, top, bottom = 400, 236, 40, 12, 12, 38
    drawn = {name: [(a, b) for a, b in points if math.isfinite(b)] for name, points in lines.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    every = [point for points in drawn.values() for point in points] or [(0.0, 0.0)]
    x0, x1 = min(a for a, _ in every), max(a for a, _ in every)
    ticks = _ticks(min(0.0, *(b for _, b in every)), max(b for _, b in every))
    y0, y1 = ticks[0], ticks[-1]

    def place(a: float, b: float) -> tuple[float, float]:
        across = (a - x0) / (x1 - x0) if x1 > x0 else 0.5
        up = (b - y0) / (y1 - y0)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    parts = []
    for tick in ticks:
        _, at = place(x0, tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(left - 6, at + 4, f"{tick:g}", "soft end"))
    for tick in sorted({round(x0), round((x0 + x1) / 2), round(x1)}):
        parts.append(_text(place(tick, y0)[0], height - bottom + 16, f"{tick:g}", "soft middle"))
    parts.append(_text((left + width - right) / 2, height - 4, x, "soft middle"))
    for number, (_name, points) in enumerate(drawn.items(), 1):
        shown = points if len(points) <= 400 else points[:: math.ceil(len(points) / 400)]
        line = " ".join("{:.1f},{:.1f}".format(*place(a, b)) for a, b in shown)
        parts.append(f'<polyline class="line series-{number}" points="{line}"/>')
        cx, cy = place(*points[-1])
        parts.append(f'<circle class="end series-{number}" cx="{cx:.1f}" cy="{cy:.1f}" r="3"/>')
    told = "; ".join(f"{name} begins at {p[0][1]:.3g} and ends at {p[-1][1]:.3g}" for name, p in drawn.items())
    return _svg(width, height, f"{y} by {x}: {told}", parts, "chart")


def columns(bars: Mapping[str, tuple[float, float | None]], x: str, y: str, share: bool = True) -> Markup:
    """Values between 0 and 1, a column a label: ``{label: (mean, extreme)}``, the extreme drawn as a tick.

    Args:
        share: whether they are written as percentages.
    """
    width, height, left, right, top, bottom = 400, 170, 40, 8, 10, 38
    inner, tall = width - left - right, height - top - bottom
    slot = inner / max(1, len(bars))
    parts = []
    for tick in (0.0, 0.5, 1.0):
        at = top + (1 - tick) * tall
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at:g}" y2="{at:g}"/>')
        parts.append(_text(left - 6, at + 4, f"{100 * tick:g} %" if share else f"{tick:g}", "soft end"))
    each = max(1, math.ceil((6.5 * max((len(label) for label in bars), default=1) + 8) / slot))
    thick = min(26.0, slot * 0.6)
    for number, (label, (mean, extreme)) in enumerate(bars.items()):
        centre = left + (number + 0.5) * slot
        filled = min(1.0, max(0.0, mean))
        parts.append(
            f'<rect class="bar" x="{centre - thick / 2:.1f}" y="{top + (1 - filled) * tall:.1f}" '
            f'width="{thick:.1f}" height="{filled * tall:.1f}" rx="1.5"/>'
        )
        if extreme is not None:
            at = top + (1 - min(1.0, max(0.0, extreme))) * tall
            parts.append(
                f'<line class="tick" x1="{centre - thick / 2 - 2:.1f}" x2="{centre + thick / 2 + 2:.1f}" '
                f'y1="{at:.1f}" y2="{at:.1f}"/>'
            )
        if number % each == 0:
            parts.append(_text(centre, height - bottom + 16, label, "soft middle"))
    parts.append(_text(left + inner / 2, height - 4, x, "soft middle"))
    told = ", ".join(
        f"{label}: {100 * mean:.0f} %" if share else f"{label}: {mean:.2f}" for label, (mean, _) in bars.items()
    )
    return _svg(width, height, f"{y} by {x}: {told}", parts, "chart")


def whisker(value: float, low: float | None, high: float | None, axis: tuple[float, float], marks: int = 1) -> Markup:
    """A dot with its interval on a common axis, as wide as its place; the numbers stand beside it as text."""
    span = axis[1] - axis[0] or 1.0

    def at(number: float) -> float:
        return round(100 * min(1.0, max(0.0, (number - axis[0]) / span)), 2)

    parts = ['<line class="grid" x1="0" x2="100" y1="7" y2="7"/>']
    if low is not None and high is not None:
        parts.append(f'<line class="whisker series-{marks}" x1="{at(low)}" x2="{at(high)}" y1="7" y2="7"/>')
    parts.append(f'<line class="dot series-{marks}" x1="{at(value)}" x2="{at(value)}" y1="7" y2="7"/>')
    return Markup(
        '<svg class="whisker-plot" viewBox="0 0 100 14" preserveAspectRatio="none" aria-hidden="true" '
        f'focusable="false">{"".join(parts)}</svg>'
    )


def meter(value: float, low: float | None, high: float | None, limits: Sequence[float]) -> Markup:
    """A share of the lead between nothing and all of it, with its interval and the gate's thresholds as ticks."""
    axis = (min(0.0, value, low or 0.0), max(1.0, value, high or 1.0) * 1.02)
    span = axis[1] - axis[0]

    def at(number: float) -> float:
        return round(100 * (number - axis[0]) / span, 2)

    parts = [f'<line class="track" x1="{at(0.0)}" x2="{at(1.0)}" y1="12" y2="12"/>']
    if low is not None and high is not None:
        parts.append(f'<line class="span" x1="{at(low)}" x2="{at(high)}" y1="12" y2="12"/>')
    parts += [f'<line class="limit" x1="{at(limit)}" x2="{at(limit)}" y1="2" y2="22"/>' for limit in limits]
    parts.append(f'<line class="value" x1="{at(value)}" x2="{at(value)}" y1="12" y2="12"/>')
    return Markup(
        '<svg class="meter" viewBox="0 0 100 24" preserveAspectRatio="none" aria-hidden="true" focusable="false">'
        f"{''.join(parts)}</svg>"
    )


def _svg(width: float, height: float, title: str, parts: Sequence[str], kind: str) -> Markup:
    label = str(escape(title))
    return Markup(
        f'<svg class="figure {kind}" viewBox="0 0 {width:g} {height:g}" style="--natural:{width:g}px" role="img" '
        f'aria-label="{label}"><title>{label}</title>{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover a range."""
    span = high - low or 1.0
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * number, 10) for number in range(first, max(last, first + 1) + 1)]


def heat_map_png(similarity: Tensor, layers: Mapping[int, int]) -> str:
    """CKA ``(L_o, L_n)`` with the chosen path, as base64 PNG; drawn once of a pair, which each adapter's run shows."""
    return _drawn(tuple(map(tuple, similarity.float().tolist())), tuple(layers.items()))


@functools.lru_cache(maxsize=16)
def _drawn(similarity: tuple[tuple[float, ...], ...], path: tuple[tuple[int, int], ...]) -> str:
    from matplotlib.figure import Figure

    size = (2.5 + 0.28 * len(similarity[0]), 2 + 0.24 * len(similarity))
    figure: Any = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(similarity, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    old, new = [o for o, _ in path], [n for _, n in path]
    axes.plot(new, old, "o-", color="white", markeredgecolor="black", linewidth=1.5)
    axes.set_xlabel("new layer")
    axes.set_ylabel("old layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, label="CKA")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
