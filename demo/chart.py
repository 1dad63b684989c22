# SPDX-License-Identifier: Apache-2.0
"""Line charts as inline SVG, by hand: two series over each other, and vertical marks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 860, 320  # pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 34, 46


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points joined by a line. `style` is a CSS class."""

    name: str
    style: str
    points: tuple[tuple[float, float], ...]
    tips: tuple[str, ...] = ()
    """What each point says under the mouse; none, or one a point."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A vertical line at `x` with a number on top, and words under the mouse."""

    x: float
    label: str
    tip: str


def line_chart(title: str, x_label: str, y_label: str, series: Sequence[Series], marks: Sequence[Mark]) -> str:
    """An SVG element; axes start and end at round numbers, and an empty chart is still a chart."""
    xs = [x for line in series for x, _ in line.points if math.isfinite(x)] + [mark.x for mark in marks]
    ys = [y for line in series for _, y in line.points if math.isfinite(y)]
    x_ticks, y_ticks = ticks(xs), ticks(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return (
            round(_LEFT + across * (WIDTH - _LEFT - _RIGHT), 1),
            round(HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM), 1),
        )

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
    ]
    for tick in y_ticks:
        x, y = place(x_ticks[0], tick)
        parts.append(f'<line class="grid" x1="{x}" y1="{y}" x2="{WIDTH - _RIGHT}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{x - 8}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x, y = place(tick, y_ticks[0])
        parts.append(f'<text class="tick" x="{x}" y="{y + 18}" text-anchor="middle">{tick:g}</text>')
    middle = _LEFT + (WIDTH - _LEFT - _RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="axis" x="{_LEFT}" y="14">{escape(y_label)}</text>')
    for mark in marks:
        x, bottom = place(mark.x, y_ticks[0])
        parts.append(
            f'<g class="mark"><title>{escape(mark.tip)}</title>'
            f'<line x1="{x}" y1="{_TOP}" x2="{x}" y2="{bottom}"/>'
            f'<circle cx="{x}" cy="{_TOP - 8}" r="9"/>'
            f'<text x="{x}" y="{_TOP - 4}" text-anchor="middle">{escape(mark.label)}</text></g>'
        )
    for line in series:
        tips = line.tips or ("",) * len(line.points)
        finite = [
            (place(*point), tip) for point, tip in zip(line.points, tips, strict=True) if all(map(math.isfinite, point))
        ]
        parts.append(_line(line, finite))
    return "\n".join([*parts, "</svg>"])


def ticks(values: Sequence[float]) -> list[float]:
    """Four to nine round numbers, evenly spaced, that hold all `values` between the first and the last."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low < 1e-9 * max(abs(low), abs(high), 1.0):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _line(line: Series, dots: Sequence[tuple[tuple[float, float], str]]) -> str:
    path = " ".join(f"{x},{y}" for (x, y), _ in dots)
    parts = [f'<g class="{escape(line.style)}"><title>{escape(line.name)}</title><polyline points="{path}"/>']
    for (x, y), tip in dots:
        if tip:
            parts.append(f'<circle cx="{x}" cy="{y}" r="3"><title>{escape(tip)}</title></circle>')
    return "".join([*parts, "</g>"])
