# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Plots as plain SVG, without a library."""

from __future__ import annotations

import math
from typing import NamedTuple, Sequence
from xml.sax.saxutils import escape

WIDTH = 760
COLOURS = ("#0b6e99", "#c2452d", "#4c8c2b", "#8a5aa8", "#b8860b")
_STYLE = "font-family:sans-serif;font-size:12px;fill:#222"


class Line(NamedTuple):
    """A curve with its name."""

    name: str
    points: Sequence[tuple[float, float]]


class Bar(NamedTuple):
    """A ratio with its spread and its limits."""

    name: str
    median: float
    low: float
    high: float
    must: float | None = None
    aim: float | None = None


def short(value: float) -> str:
    """A number as it stands at an axis: 250k, 1M, 0.25."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{letter}"
    return f"{value:.3g}"


def ticks(top: float, wanted: int = 5) -> list[float]:
    """Round numbers from 0 to at least ``top``, about ``wanted`` steps."""
    if top <= 0:
        return [0.0, 1.0]
    raw = top / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    return [step * k for k in range(math.ceil(top / step - 1e-9) + 1)]


def _document(height: int, title: str, body: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
            f' role="img" style="{_STYLE}">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
            _text(WIDTH / 2, 22, title, "middle", "font-size:15px;font-weight:bold"),
            *body,
            "</svg>",
            "",
        ]
    )


def _text(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    more = f' style="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float, *, stroke: str = "#ddd", more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}"{more}/>'


def lines(title: str, x_name: str, y_name: str, curves: Sequence[Line]) -> str:
    """Curves over a linear grid that begins at 0; ValueError without a point."""
    points = [point for curve in curves for point in curve.points]
    if not points:
        raise ValueError(f"{title}: nothing to draw")
    left, right, top, bottom = 80, WIDTH - 20, 40, 340
    xs, ys = ticks(max(x for x, _y in points)), ticks(max(y for _x, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / xs[-1], bottom - (bottom - top) * y / ys[-1]

    body = []
    for x in xs:
        at = place(x, 0)[0]
        body += [_rule(at, top, at, bottom), _text(at, bottom + 18, short(x), "middle")]
    for y in ys:
        at = place(0, y)[1]
        body += [_rule(left, at, right, at), _text(left - 8, at + 4, short(y), "end")]
    body.append(_text((left + right) / 2, bottom + 38, x_name, "middle"))
    body.append(
        f'<text x="18" y="{(top + bottom) / 2}" text-anchor="middle" transform="rotate(-90 18 {(top + bottom) / 2})">'
        f"{escape(y_name)}</text>"
    )
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        placed = [place(x, y) for x, y in curve.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed]
        y = bottom + 60 + 18 * number
        body += [
            _rule(left, y - 4, left + 24, y - 4, stroke=colour, more=' stroke-width="2"'),
            _text(left + 32, y, curve.name),
        ]
    return _document(bottom + 60 + 18 * len(curves), title, body)


def bars(title: str, ratios: Sequence[Bar]) -> str:
    """Ratios on a logarithmic axis, 1 is even; black marks: must, dashed ones: aim; ValueError without a bar."""
    if not ratios:
        raise ValueError(f"{title}: nothing to draw")
    smallest = min(value for bar in ratios for value in (bar.low, bar.aim or bar.low, bar.must or bar.low))
    greatest = max(value for bar in ratios for value in (bar.high, bar.must or bar.high))
    low = min(-1, math.floor(math.log10(max(smallest, 1e-4))))
    high = max(0.3, math.log10(max(greatest, 1e-4)) + 0.1)
    left, right, top, step = 380, WIDTH - 60, 46, 22
    bottom = top + step * len(ratios)

    def place(value: float) -> float:
        return left + (right - left) * (math.log10(max(value, 10.0**low)) - low) / (high - low)

    body = []
    for power in range(low, math.floor(high) + 1):
        for factor in (1, 2, 5):
            value = factor * 10.0**power
            if math.log10(value) <= high:
                at = place(value)
                body.append(_rule(at, top - 4, at, bottom, stroke="#888" if value == 1 else "#ddd"))
                if factor == 1 or high - low < 2.5:
                    body.append(_text(at, bottom + 16, short(value), "middle"))
    for number, bar in enumerate(ratios):
        y = top + step * number
        start, end = sorted((place(1), place(bar.median)))
        colour = COLOURS[0] if bar.median <= 1 else COLOURS[1]
        body += [
            _text(left - 8, y + 14, bar.name, "end"),
            f'<rect x="{start:.1f}" y="{y + 4}" width="{end - start:.1f}" height="{step - 8}" fill="{colour}"'
            ' fill-opacity="0.75"/>',
            _rule(place(bar.low), y + step / 2, place(bar.high), y + step / 2, stroke="#222"),
            _text(right + 8, y + 14, short(float(f"{bar.median:.2g}"))),
        ]
        for limit, more in ((bar.must, ' stroke-width="2"'), (bar.aim, ' stroke-width="2" stroke-dasharray="3 2"')):
            if limit is not None:
                body.append(_rule(place(limit), y + 2, place(limit), y + step - 2, stroke="#000", more=more))
    body.append(
        _text((left + right) / 2, bottom + 36, "ours ÷ theirs (logarithmic); mark: must, dashed: aim", "middle")
    )
    return _document(bottom + 48, title, body)
