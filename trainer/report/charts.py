"""Charts as inline SVG, each with its data as a table and a text in its place.

Colours, fonts and the dark scheme come from the page's style sheet, by class names. matplotlib's SVG has colours of its
own and letters as outlines, which neither follow a scheme nor can be read by a screen reader; libraries for charts in a
browser need scripts, which the page forbids. A chart is 360 units wide: on a phone one unit is about one pixel, and
text of 11 units can be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 38
LABELS = 112
"""Width of the names beside a dot chart."""

MOST_LETTERS = 16
"""Letters of a name beside a dot chart; its table has the whole name."""

COLOURS = 8
"""Number of the classes ``c0``, ``c1``, ... of the style sheet; further series take them again with dashes."""

MOST_POINTS = 200
"""Points of a line, and lines of its table; a longer series is thinned evenly."""

_DASHES = ("", "6 3", "2 2", "8 3 2 3")


@dataclass(frozen=True)
class Point:
    """A value with its 95 % interval, if it has one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """A line, or the dots of one colour: name, and a point for each place, None where it is not known."""

    name: str
    places: Sequence[float]
    points: Sequence[Point | None]

    @staticmethod
    def of(name: str, places: Sequence[float], values: Sequence[float | None]) -> Series:
        """Return a series of values without intervals."""
        known = [value is not None and math.isfinite(value) for value in values]
        return Series(
            name,
            places,
            [Point(value) if ok and value is not None else None for value, ok in zip(values, known, strict=True)],
        )

    def known(self) -> list[tuple[float, Point]]:
        """Return the points that are known, with their places."""
        return [(x, point) for x, point in zip(self.places, self.points, strict=True) if point is not None]


@dataclass(frozen=True)
class LegendEntry:
    """A name in the legend, with the class of its colour, and the dashes of its line.

    Attributes:
        shape: ``line``, ``dot`` or ``bar``.
    """

    name: str
    colour: str
    dashes: str
    shape: str = "line"


@dataclass(frozen=True)
class Chart:
    """A chart ready for the page.

    Attributes:
        title: caption.
        svg: the drawing.
        legend: names of its lines; empty for a single one.
        header, rows: the data as a table, texts.
    """

    title: str
    svg: Markup
    legend: list[LegendEntry]
    header: list[str]
    rows: list[list[str]]


def short(value: float) -> str:
    """Format a number in a few characters, such as ``1.2M``, ``0.731`` or ``1e-4``."""
    size = abs(value)
    for unit, step in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= step:
            return f"{value / step:.3g}{unit}"
    if size and size < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"


def precise(value: float | None) -> str:
    """Format a number for a table: whole numbers in full, others with four significant digits at least."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.3g}"


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    names: Sequence[str] = (),
    logarithmic: bool = False,
    diagonal: bool = False,
    zero: bool = False,
) -> Chart | None:
    """Draw lines; None if no series has a point.

    Args:
        title: caption.
        x_label, y_label: words at the axes.
        series: the lines; their places are x values.
        names: names of the places 0, 1, ...; then the places are not numbers, and dots are drawn as well.
        logarithmic: both axes are logarithmic; only values above 0 are drawn.
        diagonal: draw the line on which x equals y.
        zero: the y axis begins at 0.
    """
    series = [_thinned(one) for one in series]
    drawn = [one.known() for one in series]
    if logarithmic:
        # An interval may reach to 0.
        drawn = [[(x, Point(p.value)) for x, p in points if x > 0 and p.value > 0] for points in drawn]
    if not any(drawn):
        return None
    xs = [x for points in drawn for x, _ in points]
    ys = [y for points in drawn for _, p in points for y in (p.value, p.low, p.high) if y is not None]
    if diagonal:
        xs = ys = [*xs, *ys]
    if names:
        xs = [-0.5, len(names) - 0.5]
    elif not logarithmic:
        xs = [0.0, *xs]
    if zero:
        ys = [0.0, *ys]
    across = _Axis(xs, LEFT, WIDTH - RIGHT, logarithmic, exact=bool(names) or not logarithmic)
    up = _Axis(ys, HEIGHT - BOTTOM, TOP, logarithmic)
    parts = [_horizontal(up, LEFT, WIDTH - RIGHT)]
    if names:
        step = math.ceil(len(names) / 8)
        parts += [
            _text(across.at(place), HEIGHT - BOTTOM + 14, name, "middle")
            for place, name in enumerate(names)
            if place % step == 0
        ]
    else:
        parts += [_text(across.at(tick), HEIGHT - BOTTOM + 14, short(tick), "middle") for tick in across.ticks]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle"))
    parts.append(
        Markup('<text class="axis" transform="translate(10 {}) rotate(-90)" text-anchor="middle">{}</text>').format(
            (TOP + HEIGHT - BOTTOM) / 2, y_label
        )
    )
    if diagonal:
        low, high = across.low, across.high
        parts.append(_line(across.at(low), up.at(low), across.at(high), up.at(high), "grid"))
    for number, points in enumerate(drawn):
        colour, dashes = _look(number)
        # Intervals at the same place stand side by side.
        shift = 4 * (number - (len(drawn) - 1) / 2) if names else 0.0
        path = " ".join(
            f"{'L' if place else 'M'}{across.at(x) + shift:.1f} {up.at(p.value):.1f}"
            for place, (x, p) in enumerate(points)
        )
        if len(points) > 1:
            parts.append(
                Markup('<path class="line {}" stroke-dasharray="{}" d="{}"/>').format(colour, dashes or "none", path)
            )
        for x, point in points:
            if point.low is not None and point.high is not None:
                parts.append(
                    _line(
                        across.at(x) + shift,
                        up.at(point.low),
                        across.at(x) + shift,
                        up.at(point.high),
                        f"whisker {colour}",
                    )
                )
            if names or diagonal or len(points) == 1:
                parts.append(_dot(across.at(x) + shift, up.at(point.value), colour))
    header, rows = _table(x_label, series, names)
    return Chart(title, _svg(HEIGHT, _alternative(title, series), parts), _legend(series), header, rows)


def dot_chart(title: str, x_label: str, names: Sequence[str], series: Sequence[Series]) -> Chart | None:
    """Draw a line of dots for each name, with intervals; the places of the series are numbers of names.

    None if no series has a point.
    """
    points = [point for one in series for _, point in one.known()]
    if not points:
        return None
    gap = 9
    band = gap * max(len(series), 1) + 9
    height = TOP + band * len(names) + BOTTOM
    across = _Axis(
        [value for p in points for value in (p.value, p.low, p.high) if value is not None], LABELS, WIDTH - RIGHT
    )
    parts = [_vertical(across, TOP, height - BOTTOM)]
    for place, name in enumerate(names):
        middle = TOP + band * (place + 0.5)
        parts.append(
            _text(LABELS - 6, middle + 4, name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…", "end")
        )
        if place:
            parts.append(_line(0, TOP + band * place, WIDTH - RIGHT, TOP + band * place, "grid"))
    for number, one in enumerate(series):
        colour, _ = _look(number)
        for x, point in one.known():
            y = TOP + band * (x + 0.5) + gap * (number - (len(series) - 1) / 2)
            if point.low is not None and point.high is not None:
                parts.append(_line(across.at(point.low), y, across.at(point.high), y, f"whisker {colour}"))
            parts.append(_dot(across.at(point.value), y, colour))
    parts += [_text(across.at(tick), height - BOTTOM + 14, short(tick), "middle") for tick in across.ticks]
    parts.append(_text((LABELS + WIDTH - RIGHT) / 2, height - 6, x_label, "middle"))
    header, rows = _table("", series, names)
    return Chart(title, _svg(height, _alternative(title, series), parts), _legend(series, "dot"), header, rows)


def share_chart(title: str, shares: Sequence[tuple[str, float]]) -> Chart | None:
    """Draw parts of a whole as one bar; None if there is no whole."""
    total = sum(share for _, share in shares)
    if not total > 0:
        return None
    parts, at = [], float(RIGHT)
    width = WIDTH - 2 * RIGHT
    for number, (_, share) in enumerate(shares):
        wide = width * share / total
        colour, _ = _look(number)
        parts.append(
            Markup('<rect class="bar {}" x="{}" y="12" width="{}" height="30"/>').format(
                colour, f"{at:.1f}", f"{wide:.1f}"
            )
        )
        if wide > 34:
            parts.append(
                Markup('<text class="inside" x="{}" y="31" text-anchor="middle">{}</text>').format(
                    f"{at + wide / 2:.1f}", f"{100 * share / total:.0f} %"
                )
            )
        at += wide
    rows = [[name, f"{100 * share / total:.1f} %"] for name, share in shares]
    text = f"{title}: " + ", ".join(f"{name} {share}" for name, share in rows)
    legend = [LegendEntry(f"{name} {share}", *_look(number), "bar") for number, (name, share) in enumerate(rows)]
    return Chart(title, _svg(54, text, parts), legend, ["part", "share"], rows)


class _Axis:
    """Scale from values to positions.

    Args:
        values: at least one.
        start, end: positions of the least and of the largest value.
        logarithmic: equal factors have equal distances.
        exact: the axis ends at the extreme values, and not at ticks beyond them.
    """

    def __init__(
        self, values: Sequence[float], start: float, end: float, logarithmic: bool = False, exact: bool = False
    ) -> None:
        low, high = min(values), max(values)
        self._scale: Callable[[float], float] = math.log10 if logarithmic else float
        if logarithmic:
            low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
            high = high if high > low else 10 * low
            powers = range(round(math.log10(low)), round(math.log10(high)) + 1)
            self.ticks = [10.0**power for power in powers]
        else:
            if high <= low:
                margin = abs(low) / 10 or 1.0
                low, high = low - margin, high + margin
            step = _step((high - low) / 4)
            if not exact:
                low, high = step * math.floor(low / step), step * math.ceil(high / step)
            first = math.ceil(low / step - 1e-9)
            self.ticks = [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]
        self.low, self.high = low, high
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        """Return the position of a value."""
        low, high = self._scale(self.low), self._scale(self.high)
        return self._start + (self._end - self._start) * (self._scale(value) - low) / (high - low)


def _step(rough: float) -> float:
    """Return the next larger of 1, 2, 2.5, 5 and 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= rough), 10 * power)


def _thinned(series: Series) -> Series:
    """Return at most MOST_POINTS points of a series, evenly, and always the last."""
    step = math.ceil(len(series.points) / MOST_POINTS)
    if step <= 1:
        return series
    kept = list(range(len(series.points) - 1, -1, -step))[::-1]
    return Series(series.name, [series.places[at] for at in kept], [series.points[at] for at in kept])


def _look(number: int) -> tuple[str, str]:
    """Return the class and the dashes of the series with a number."""
    return f"c{number % COLOURS}", _DASHES[(number % COLOURS + number // COLOURS) % len(_DASHES)]


def _legend(series: Sequence[Series], shape: str = "line") -> list[LegendEntry]:
    if len(series) == 1:
        return []
    return [LegendEntry(one.name, *_look(number), shape) for number, one in enumerate(series) if one.known()]


def _table(x_label: str, series: Sequence[Series], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines: a column for the places, and one for each series, or a place and a value each."""
    places = list(dict.fromkeys(place for one in series for place in one.places))
    if len(places) > max((len(one.places) for one in series), default=0):
        # The lines have places of their own, such as the curves of calibration.
        rows = [
            [one.name, precise(place), _cell(point)]
            for one in series
            for place, point in zip(one.places, one.points, strict=True)
        ]
        return ["", x_label, "value"], rows
    found = [dict(zip(one.places, one.points, strict=True)) for one in series]
    rows = [
        [names[round(place)] if names else precise(place), *(_cell(points.get(place)) for points in found)]
        for place in sorted(places)
    ]
    return [x_label, *(one.name for one in series)], rows


def _cell(point: Point | None) -> str:
    if point is None:
        return "–"
    spread = "" if point.low is None else f" ({precise(point.low)}, {precise(point.high)})"
    return f"{precise(point.value)}{spread}"


def _alternative(title: str, series: Sequence[Series]) -> str:
    """Describe a chart in words: the first and the last value of each series."""
    parts = []
    for one in series:
        known = one.known()
        if known:
            first, last = known[0][1].value, known[-1][1].value
            name = f"{one.name} " if len(series) > 1 else ""
            parts.append(f"{name}{short(first)}" + (f" to {short(last)}" if len(known) > 1 else ""))
    return f"{title}: {'; '.join(parts)}"


def _svg(height: float, text: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, text, Markup("").join(parts)
    )


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text class="axis" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        f"{x:.1f}", f"{y:.1f}", anchor, text
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
        kind, *(f"{value:.1f}" for value in (x1, y1, x2, y2))
    )


def _dot(x: float, y: float, colour: str) -> Markup:
    return Markup('<circle class="dot {}" cx="{}" cy="{}" r="3"/>').format(colour, f"{x:.1f}", f"{y:.1f}")


def _horizontal(axis: _Axis, left: float, right: float) -> Markup:
    """Draw the lines and numbers of a y axis."""
    return Markup("").join(
        part
        for tick in axis.ticks
        for part in (
            _line(left, axis.at(tick), right, axis.at(tick), "grid"),
            _text(left - 5, axis.at(tick) + 4, short(tick), "end"),
        )
    )


def _vertical(axis: _Axis, top: float, bottom: float) -> Markup:
    """Draw the lines of an x axis."""
    return Markup("").join(_line(axis.at(tick), top, axis.at(tick), bottom, "grid") for tick in axis.ticks)
