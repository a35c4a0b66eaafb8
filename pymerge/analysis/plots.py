"""Plots as inline SVG: matrices, lines and bars, in the colours that the page sets."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pymerge.messages.html import escaped

# Hues that differ on light and dark ground, for as many models; then they repeat.
COLOURS = (
    "#2f6fde", "#e2711d", "#1f9d6b", "#c2407f", "#8a63d2", "#b08900",
    "#0f9bb3", "#d6483f", "#6b8e23", "#8d6e63", "#d08cf0", "#7a8794",
)  # fmt: skip

Number = float | None


def colour(place: int) -> str:
    """A model's."""
    return COLOURS[place % len(COLOURS)]


def percent(value: Number, digits: int = 1) -> str:
    """ "12.3 %", or "–" for what is not known."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def number(value: Number) -> str:
    return "–" if value is None else f"{value:.3g}"


def tint(value: Number, least: float, most: float) -> str:
    """The background of a cell: warm above 0, cool below."""
    if value is None:
        return "transparent"
    share = value / most if value >= 0 else value / least
    hue = "warm" if value >= 0 else "cool"
    return f"rgba(var(--{hue}),{0.75 * max(0.0, min(1.0, share)):.3f})"


def matrix(
    title: str, values: Sequence[Sequence[Number]], *, least: float, most: float, rows: str = ""
) -> str:
    """A square of cells, models against models by their numbers. rows: what the rows are."""
    count = len(values)
    cell = 44 if count <= 8 else 34
    left, top = 30, 24
    size = cell * count
    parts = [_open(left + size + 2, top + size + 2, title)]
    for k in range(count):
        middle = k * cell + cell / 2
        parts.append(_text(left + middle, top - 8, str(k + 1), "middle"))
        parts.append(_text(left - 8, top + middle + 4, str(k + 1), "end"))
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            x, y = left + j * cell, top + i * cell
            shown = "–" if value is None else f"{value:.2f}"
            parts.append(
                f"<g><title>{rows or 'models'} {i + 1}, {j + 1}: {number(value)}</title>"
                f'<rect x="{x}" y="{y}" width="{cell - 2}" height="{cell - 2}" rx="3"'
                f' style="fill:{tint(value, least, most)};stroke:var(--line)"/>'
                f'<text x="{x + cell / 2 - 1}" y="{y + cell / 2 + 3}" text-anchor="middle"'
                f' class="{"value" if count <= 8 else "value small"}">{shown}</text></g>'
            )
    return "".join(parts) + "</svg>"


def lines(
    title: str,
    values: Sequence[Sequence[Number]],
    labels: Sequence[str],
    *,
    names: Sequence[str],
    as_percent: bool = False,
    positions: Sequence[float] | None = None,
    most: float | None = None,
    across: str = "",
) -> str:
    """A line for each row of values over the same places. labels: of the places; names: of the
    lines. positions: of the places from 0 to 1, by default evenly.
    """
    width, height, left, bottom, top = 640, 220, 56, 34, 10
    known = [v for row in values for v in row if v is not None]
    low = min([0.0, *known])
    high = most if most is not None else max([low + 1e-300, *known]) * 1.05
    places = len(labels)
    if positions is None:
        positions = [k / (places - 1) if places > 1 else 0.5 for k in range(places)]

    def x(k: int) -> float:
        assert positions is not None
        return left + positions[k] * (width - left - 12)

    def y(value: float) -> float:
        return top + (high - value) / (high - low) * (height - top - bottom)

    parts = [_open(width, height, title)]
    for tick in ticks(low, high):
        shown = f"{100 * tick:g} %" if as_percent else f"{tick:g}"
        parts.append(_rule(left, y(tick), width - 12, y(tick)))
        parts.append(_text(left - 6, y(tick) + 4, shown, "end"))
    last = -math.inf
    for k, label in enumerate(labels):
        if x(k) - last >= max(30, 8 * min(len(label), 12)):
            parts.append(_text(x(k), height - bottom + 16, label[:12], "middle"))
            last = x(k)
    parts.append(_text((left + width) / 2, height - 3, across, "middle"))
    for row, (series, name) in enumerate(zip(values, names, strict=True)):
        points = [(x(k), y(v), v, k) for k, v in enumerate(series) if v is not None]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in points)
        parts.append(
            f'<polyline points="{path}" style="fill:none;stroke:{colour(row)};stroke-width:1.8"/>'
        )
        for px, py, value, k in points:
            shown = percent(value) if as_percent else number(value)
            parts.append(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{2.6 if places <= 40 else 1.6}"'
                f' style="fill:{colour(row)}">'
                f"<title>{escaped(name)}, {escaped(labels[k])}: {shown}</title></circle>"
            )
    return "".join(parts) + "</svg>"


def stacked(title: str, parts_of: Sequence[tuple[int, int]], total: int) -> str:
    """Bars over the number of models that vote: (elements, those in conflict) for m = 0 to K."""
    count = len(parts_of)
    width, height, left, bottom, top = 640, 220, 56, 34, 18
    each = (width - left - 12) / count
    high = max([1e-9, *(number / total for number, _ in parts_of if total)]) * 1.1
    parts = [_open(width, height, title)]

    def y(value: float) -> float:
        return top + (high - value) / high * (height - top - bottom)

    for tick in ticks(0, high):
        parts.append(_rule(left, y(tick), width - 12, y(tick)))
        parts.append(_text(left - 6, y(tick) + 4, f"{100 * tick:g} %", "end"))
    for m, (elements, conflicts) in enumerate(parts_of):
        share, bad = (elements / total, conflicts / total) if total else (0.0, 0.0)
        x = left + m * each + 0.15 * each
        wide = 0.7 * each
        parts.append(
            f"<g><title>{m}: {elements:,} elements, {conflicts:,} with both signs</title>"
            f'<rect x="{x:.1f}" y="{y(share):.1f}" width="{wide:.1f}"'
            f' height="{y(0) - y(share):.1f}" style="fill:rgba(var(--cool),.55)"/>'
            f'<rect x="{x:.1f}" y="{y(bad):.1f}" width="{wide:.1f}"'
            f' height="{y(0) - y(bad):.1f}" style="fill:rgba(var(--warm),.9)"/></g>'
        )
        parts.append(_text(x + wide / 2, y(share) - 4, percent(share), "middle"))
        parts.append(_text(x + wide / 2, height - bottom + 16, str(m), "middle"))
    parts.append(_text((left + width) / 2, height - 3, "models that vote", "middle"))
    return "".join(parts) + "</svg>"


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers from low to high."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    step = 10.0 ** math.floor(math.log10(span))
    for finer in (1, 2, 2.5, 2):
        if span / step >= 4:
            break
        step /= finer if finer != 1 else 2
    first = math.ceil(low / step - 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _open(width: float, height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img"'
        f' aria-label="{escaped(title)}">'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(text)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        ' style="stroke:var(--line)"/>'
    )
