"""A report as a picture: memory against divergence, one dot for each format. SVG by hand, a pure function.

Fewer bits are to the left, less harm is lower: the best format is the one nearest to the lower left corner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from barista.cache import size
from router.precision.figures import Measured, Report
from router.precision.report import threads

WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 92, 820, 104, 424  # of the plotting area
LABEL_HEIGHT = 40  # two lines of text
SMALLEST = 1e-6  # nats: what is drawn for a divergence of 0

INK, FAINT, RULE, PAPER = "#2b2118", "#85776a", "#e7ddd0", "#fffdf9"
COLOURS = ("#b5522b", "#2f6f73", "#c08a1e", "#6a4a86", "#5d7d3a", "#8f3550", "#3d5a98")
FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"


def draw(report: Report) -> str:
    """An SVG document. Horizontal: bytes in memory, from 0. Vertical: mean KL divergence, logarithmic, with a line for
    its standard error."""
    largest = max(measured.held_bytes for measured in (report.reference, *report.formats))
    low, high = decades([kl_of(measured) for measured in report.formats])
    parts = [_header(report), _grid(low, high), _memory_axis(largest), _reference_line(report, largest)]
    dots = [(across(m.held_bytes, largest), up(kl_of(m), low, high)) for m in report.formats]
    labels = spaced([y for _, y in dots], LABEL_HEIGHT, TOP + LABEL_HEIGHT / 2)
    for index, (measured, dot, label) in enumerate(zip(report.formats, dots, labels, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        parts.append(_whisker(measured, dot[0], low, high, colour) + _dot(report, measured, dot, label, colour))
    return _document("\n".join(part for part in parts if part))


def kl_of(measured: Measured) -> float:
    """The mean divergence, or SMALLEST if that is more: a logarithm needs it."""
    return max(SMALLEST, measured.loss.kl.value)


def decades(values: Sequence[float]) -> tuple[int, int]:
    """The powers of ten, as exponents, that enclose the values: at least one apart."""
    if not values:
        return -1, 0
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def across(held_bytes: float, largest: float) -> float:
    """Bytes -> x; the largest stands a little before the right edge."""
    return LEFT + (RIGHT - LEFT) * held_bytes / (1.08 * largest)


def up(kl: float, low: int, high: int) -> float:
    """Nats -> y, which grows downwards."""
    share = (math.log10(kl) - low) / (high - low)
    return BOTTOM - (BOTTOM - TOP) * min(1.0, max(0.0, share))


def spaced(heights: Sequence[float], least: float, top: float) -> list[float]:
    """The heights moved downwards until each is `least` below the one above it and none is above `top`; in order."""
    moved = list(heights)
    limit = top
    for index in sorted(range(len(heights)), key=heights.__getitem__):
        moved[index] = max(heights[index], limit)
        limit = moved[index] + least
    return moved


def round_step(largest: float) -> float:
    """1, 2 or 5 times a power of ten, so that three to seven steps reach `largest`."""
    power = 10.0 ** math.floor(math.log10(largest / 3))
    return next(factor * power for factor in (5, 2, 1) if factor * power <= largest / 3)


def _header(report: Report) -> str:
    subtitle = (
        f"{report.num_predicted:,} tokens of {report.text}, beside {report.reference.format}, on {threads(report)}"
    )
    return (
        _text(LEFT - 60, 42, f"{report.model}: what fewer bits cost", 21, INK, weight=650)
        + _text(LEFT - 60, 66, subtitle, 13, FAINT)
        + _text(LEFT - 60, TOP - 14, "KL divergence, nats a token (lower is better)", 12, FAINT)
    )


def _grid(low: int, high: int) -> str:
    lines = []
    for exponent in range(low, high + 1):
        y = up(10.0**exponent, low, high)
        lines.append(f"<line x1='{LEFT}' x2='{RIGHT}' y1='{y:.1f}' y2='{y:.1f}' stroke='{RULE}'/>")
        lines.append(_text(LEFT - 12, y + 4, f"{10.0**exponent:g}", 12, FAINT, anchor="end"))
    return "".join(lines)


def _memory_axis(largest: int) -> str:
    marks = [_text((LEFT + RIGHT) / 2, BOTTOM + 52, "memory that the weights take", 12, FAINT, anchor="middle")]
    step = round_step(largest)
    for index in range(int(1.08 * largest / step) + 1):
        x = across(index * step, largest)
        marks.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{BOTTOM}' y2='{BOTTOM + 6}' stroke='{FAINT}'/>")
        marks.append(_text(x, BOTTOM + 24, size(index * step), 12, FAINT, anchor="middle"))
    return "".join(marks)


def _reference_line(report: Report, largest: int) -> str:
    x = across(report.reference.held_bytes, largest)
    name = f"{report.reference.format}, {size(report.reference.held_bytes)}, KL 0"
    line = f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{TOP}' y2='{BOTTOM}' stroke='{FAINT}' stroke-dasharray='3 5'/>"
    return line + _text(x - 8, BOTTOM - 10, name, 12, FAINT, anchor="end")


def _whisker(measured: Measured, x: float, low: int, high: int, colour: str) -> str:
    kl = measured.loss.kl
    if kl.error is None or kl.value <= 0:
        return ""
    top, bottom = (up(max(SMALLEST, kl.value + side * kl.error), low, high) for side in (1, -1))
    return f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{top:.1f}' y2='{bottom:.1f}' stroke='{colour}' stroke-width='2'/>"


def _dot(report: Report, measured: Measured, dot: tuple[float, float], label: float, colour: str) -> str:
    """The dot and its label, on the side where there is more room, and a thin line to it where it was moved."""
    x, y = dot
    anchor, side = ("start", 1) if x < (LEFT + RIGHT) / 2 else ("end", -1)
    first = f"{measured.format}  {report.saved(measured):.0%} less memory"
    second = f"{measured.loss.same_top1.value:.1%} same top-1, {measured.speed.median:.1f} tokens/s"
    line = ""
    if abs(label - y) > 1:
        line = f"<line x1='{x:.1f}' y1='{y:.1f}' x2='{x + side * 12:.1f}' y2='{label:.1f}' stroke='{colour}'/>"
    return (
        f"{line}<circle cx='{x:.1f}' cy='{y:.1f}' r='6.5' fill='{colour}' stroke='{PAPER}' stroke-width='1.5'/>"
        + _text(x + side * 14, label - 2, first, 13, colour, weight=650, anchor=anchor)
        + _text(x + side * 14, label + 14, second, 12, INK, anchor=anchor)
    )


def _text(x: float, y: float, words: str, points: int, colour: str, *, weight: int = 400, anchor: str = "start") -> str:
    style = f"font-size='{points}' font-weight='{weight}' fill='{colour}' text-anchor='{anchor}' xml:space='preserve'"
    return f"<text x='{x:.1f}' y='{y:.1f}' {style}>{escape(words)}</text>"


def _document(body: str) -> str:
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' height='{HEIGHT}' "
        f"{FONT}>\n"
        f"<rect width='{WIDTH}' height='{HEIGHT}' rx='14' fill='{PAPER}'/>\n{body}\n</svg>\n"
    )
