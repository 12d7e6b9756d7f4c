"""Small pictures for the report, as SVG text: curves, bars with intervals, histograms.

Written by hand rather than by a plotting library: they take the page's colours (light and dark), show values under
the pointer through CSS alone, and weigh a few kilobytes. Everything that comes from data is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from markupsafe import Markup, escape

from tunesmith.core.amounts import in_count

Point = tuple[float, float]

_WIDTH, _HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 26, 30


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: in the legend and beside values.
        points: (x, y), ascending in x; y is finite.
        kind: `main`, `faint` or `second`: how the page draws it.
    """

    name: str
    points: Sequence[Point]
    kind: str = "main"


def line_chart(title: str, series: Sequence[Series], number: Callable[[float], str], x_name: str = "step") -> Markup:
    """A chart of lines with values under the pointer; empty when no series has a point."""
    series = [one for one in series if one.points]
    if not series:
        return Markup("")
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    across, up = _scale(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT), _vertical(ys)
    ticks = nice_ticks(min(ys), max(ys), 5)
    parts = [_grid(ticks, up, number), _across_ticks(min(xs), max(xs), across, x_name)]
    parts += [_line(one, across, up) for one in series]
    parts.append(_legend(series))
    parts.append(_hover(series, across, up, number, x_name))
    label = f"{title}: " + "; ".join(_summary(one, number, x_name) for one in series if one.kind != "faint")
    return _svg("chart", _WIDTH, _HEIGHT, label, parts)


@dataclass(frozen=True)
class Dot:
    """One mark of a scatter.

    Attributes:
        name: shown under the pointer.
        x: above 0.
        y, low, high: the value and the ends of its interval, which may be missing.
        kind: `main` or `second`.
    """

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    kind: str = "main"


def scatter(title: str, dots: Sequence[Dot], number: Callable[[float], str], level: float | None = None) -> Markup:
    """Values over amounts on a scale of powers of ten, each with its interval; `level` is a line across."""
    if not dots:
        return Markup("")
    ys = [y for dot in dots for y in (dot.y, dot.low, dot.high) if y is not None] + ([] if level is None else [level])
    powers = [math.log10(dot.x) for dot in dots]
    low, high = math.floor(min(powers)), math.ceil(max(powers) + 1e-9)
    power, up = _scale(low, max(high, low + 1), _LEFT, _WIDTH - _RIGHT - 8), _vertical(ys)
    parts = [_grid(nice_ticks(min(ys), max(ys), 5), up, number)]
    for tick in range(low, max(high, low + 1) + 1):
        parts.append(_text("tick", power(tick), _HEIGHT - 9, in_count(10.0**tick).replace(".0", ""), "middle"))
    if level is not None:
        parts.append(_tag("path", "guide", d=f"M{_LEFT} {up(level):.1f}H{_WIDTH - _RIGHT}"))
    for dot in sorted(dots, key=lambda dot: dot.kind, reverse=True):
        parts.append(_mark(dot, power(math.log10(dot.x)), up, number))
    label = f"{title}: " + "; ".join(f"{dot.name} {number(dot.y)} with {dot.x:,.0f}" for dot in dots)
    return _svg("chart", _WIDTH, _HEIGHT, label, parts)


def interval_bar(value: float, low: float | None, high: float | None, span: tuple[float, float]) -> Markup:
    """A bar from zero to a value with its interval as a whisker, on a scale shared by its neighbours."""
    across = _scale(min(0.0, span[0]), max(span[1], 0.0), 1, 299)
    zero, end = across(0.0), across(value)
    parts = [_tag("rect", "bar", x=min(zero, end), y=3, width=max(1.0, abs(end - zero)), height=12, rx=2)]
    if low is not None and high is not None:
        x1, x2 = across(low), across(high)
        path = f"M{x1:.1f} 9H{x2:.1f}M{x1:.1f} 5V13M{x2:.1f} 5V13"
        parts += [_tag("path", kind, d=path) for kind in ("halo", "whisker")]  # the halo keeps it clear of the bar
    return _svg("interval", 300, 18, "", parts, stretch=True)


def histogram(bins: Sequence[tuple[str, float]], name: str) -> Markup:
    """Columns with their labels; each shows its number under the pointer."""
    most = max((count for _, count in bins), default=0)
    if most <= 0:
        return Markup("")
    width, floor = (_WIDTH - 20) / len(bins), 150 - 24
    parts = []
    every = max(1, math.ceil(len(bins) / 8))
    for index, (label, count) in enumerate(bins):
        tall = max(1.0, (floor - 22) * count / most) if count else 0.0
        x = 10 + index * width
        text = _text("tip", x + width / 2, floor - tall - 6, f"{count:,.0f}", "middle")
        bar = _tag("rect", "bar", x=x + 1, y=floor - tall, width=max(1.0, width - 2), height=tall, rx=2)
        hit = _tag("rect", "hit", x=x, y=0, width=width, height=floor)
        shown = _text("tick", x + width / 2, floor + 16, label, "middle") if index % every == 0 else ""
        parts.append(f'<g class="point">{bar}{hit}{text}</g>{shown}')
    label = f"{name}: " + ", ".join(f"{label} {count:,.0f}" for label, count in bins)
    return _svg("histogram", _WIDTH, 150, label, parts)


def stacked_bar(parts: Sequence[tuple[str, float]], *, empty_last: bool = False) -> Markup:
    """One bar made of parts; the page colours part-0, part-1, ... and writes the legend.

    Args:
        empty_last: the last part is room that is left, and is not drawn.
    """
    total = sum(value for _, value in parts)
    if total <= 0:
        return Markup("")
    shapes, x = [], 0.0
    for index, (_, value) in enumerate(parts):
        width = 600 * value / total
        if not (empty_last and index == len(parts) - 1):
            shapes.append(_tag("rect", f"part-{index}", x=x, y=0, width=max(0.0, width - 1), height=14))
        x += width
    label = ", ".join(f"{name} {100 * value / total:.0f} %" for name, value in parts)
    return _svg("stack", 600, 14, label, shapes, stretch=True)


def stacked_area(
    title: str,
    layers: Sequence[tuple[str, Sequence[float]]],
    marks: Sequence[tuple[int, str]],
    number: Callable[[float], str],
) -> Markup:
    """Layers one on another, all with a value at each place; the page colours part-0, part-1, ... as it does bars.

    Args:
        marks: where a span of places begins, and its name.
    """
    count = len(layers[0][1]) if layers else 0
    if count < 2:
        return Markup("")
    sums = [sum(values) for values in zip(*(values for _, values in layers), strict=True)]
    across, up = _scale(0, count - 1, _LEFT, _WIDTH - _RIGHT), _scale(0, max(sums) * 1.05, _HEIGHT - _BOTTOM, _TOP)
    parts, below = [_grid(nice_ticks(0, max(sums), 5), up, number)], [0.0] * count
    for index, (_, values) in enumerate(layers):
        above = [low + value for low, value in zip(below, values, strict=True)]
        edge = [f"{across(x):.1f} {up(y):.1f}" for x, y in enumerate(above)]
        back = [f"{across(x):.1f} {up(y):.1f}" for x, y in reversed(list(enumerate(below)))]
        parts.append(_tag("path", f"part-{index}", d=f"M{'L'.join([*edge, *back])}Z"))
        below = above
    for place, name in marks:
        parts.append(_tag("path", "guide", d=f"M{across(place):.1f} {_TOP}V{_HEIGHT - _BOTTOM}"))
        parts.append(_text("tick", across(place) + 2, _HEIGHT - 9, name, "start"))
    label = f"{title}: at most {number(max(sums))}"
    return _svg("chart", _WIDTH, _HEIGHT, label, parts)


def smooth(points: Sequence[Point], reach: int) -> list[Point]:
    """Each value averaged with up to `reach` on each side, fewer at the ends: no lag behind the data."""
    sums = [0.0, *accumulate(y for _, y in points)]
    found = []
    for index, (x, _) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)
        found.append((x, (sums[index + near + 1] - sums[index - near]) / (2 * near + 1)))
    return found


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most about `most` points: means of neighbours, the first and last ones kept as they are."""
    if len(points) <= most:
        return list(points)
    size = math.ceil((len(points) - 2) / max(1, most - 2))
    groups = [points[start : min(start + size, len(points) - 1)] for start in range(1, len(points) - 1, size)]
    inner = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [points[0], *inner, points[-1]]


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers inside low..high, at most about `most`; both ends may lie outside of them."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * times for times in (1, 2, 2.5, 5, 10) if size * times >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * index for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    spread = high - low or 1.0
    return lambda value: start + (end - start) * (value - low) / spread


def _vertical(ys: Sequence[float]) -> Callable[[float], float]:
    low, high = min(ys), max(ys)
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return _scale(low - margin, high + margin, _HEIGHT - _BOTTOM, _TOP)


def _grid(ticks: Sequence[float], up: Callable[[float], float], number: Callable[[float], str]) -> str:
    parts = []
    for tick in ticks:
        y = up(tick)
        parts.append(_tag("path", "grid", d=f"M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"))
        parts.append(_text("tick", _LEFT - 7, y + 4, number(tick), "end"))
    return "".join(parts)


def _across_ticks(low: float, high: float, across: Callable[[float], float], name: str) -> str:
    ticks = [tick for tick in nice_ticks(low, high, 5) if tick == int(tick)] or [low]
    parts = []
    for index, tick in enumerate(ticks):
        text = f"{name} {tick:,.0f}" if index == len(ticks) - 1 else f"{tick:,.0f}"
        x = across(tick)
        at_edge = x > _WIDTH - 50
        parts.append(_text("tick", x if not at_edge else _WIDTH - 4, _HEIGHT - 9, text, "end" if at_edge else "middle"))
    return "".join(parts)


def _line(one: Series, across: Callable[[float], float], up: Callable[[float], float]) -> str:
    points = thin(one.points, 300)
    if len(points) == 1:
        return _tag("circle", f"dot {one.kind}", cx=across(points[0][0]), cy=up(points[0][1]), r=3)
    path = "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in points)
    dots = ""
    if len(points) <= 12:
        dots = "".join(_tag("circle", f"dot {one.kind}", cx=across(x), cy=up(y), r=2.5) for x, y in points)
    return _tag("path", f"line {one.kind}", d=f"M{path}") + dots


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    parts, x = [], float(_LEFT)
    for one in series:
        parts.append(_tag("path", f"line {one.kind}", d=f"M{x:.0f} 12h16"))
        parts.append(_text("tick", x + 21, 16, one.name, "start"))
        x += 36 + 8.4 * len(one.name)
    return f'<g class="key">{"".join(parts)}</g>'


def _hover(
    series: Sequence[Series],
    across: Callable[[float], float],
    up: Callable[[float], float],
    number: Callable[[float], str],
    x_name: str,
) -> str:
    lead = next((one for one in series if one.kind == "main"), series[0])
    points = thin(lead.points, 60)
    others = [one for one in series if one is not lead and one.kind != "faint"]
    width = (_WIDTH - _LEFT - _RIGHT) / len(points)
    parts = []
    for x, y in points:
        here, height = across(x), up(y)
        near = [(one.name, _nearest(one.points, x)) for one in others]
        values = [number(y)] + [f"{name} {number(value)}" for name, value in near]
        text = f"{x_name} {x:,.0f}: {', '.join(values)}"
        box = _tag("rect", "hit", x=here - width / 2, y=_TOP, width=width, height=_HEIGHT - _TOP - _BOTTOM)
        guide = _tag("path", "guide", d=f"M{here:.1f} {_TOP}V{_HEIGHT - _BOTTOM}")
        dot = _tag("circle", "dot main", cx=here, cy=height, r=3.5)
        tip = _text("tip", _WIDTH - _RIGHT, 16, text, "end")
        parts.append(f'<g class="point">{box}{guide}{dot}{tip}</g>')
    return "".join(parts)


def _mark(dot: Dot, x: float, up: Callable[[float], float], number: Callable[[float], str]) -> str:
    y = up(dot.y)
    whisker = ""
    if dot.low is not None and dot.high is not None:
        whisker = _tag("path", "whisker", d=f"M{x:.1f} {up(dot.low):.1f}V{up(dot.high):.1f}")
    seen = whisker + _tag("circle", f"dot {dot.kind}", cx=x, cy=y, r=4.5)
    tip = _text("tip", _WIDTH - _RIGHT, 16, f"{dot.name}: {number(dot.y)}, {dot.x:,.0f} parameters", "end")
    return f'{seen}<g class="point">{_tag("circle", "hit", cx=x, cy=y, r=12)}{tip}</g>'


def _nearest(points: Sequence[Point], x: float) -> float:
    return min(points, key=lambda point: abs(point[0] - x))[1]


def _summary(one: Series, number: Callable[[float], str], x_name: str) -> str:
    (x0, y0), (x1, y1) = one.points[0], one.points[-1]
    return f"{one.name} from {number(y0)} at {x_name} {x0:,.0f} to {number(y1)} at {x_name} {x1:,.0f}"


def _svg(kind: str, width: int, height: int, label: str, parts: Sequence[str], stretch: bool = False) -> Markup:
    role = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
    aspect = ' preserveAspectRatio="none"' if stretch else ""
    return Markup(f'<svg class="{kind}" viewBox="0 0 {width} {height}"{aspect} {role}>{"".join(parts)}</svg>')


def _tag(name: str, kind: str, **numbers: float | str) -> str:
    shown = " ".join(
        f'{key}="{value:.1f}"' if isinstance(value, float) else f'{key}="{escape(value)}"'
        for key, value in numbers.items()
    )
    return f'<{name} class="{kind}" {shown}/>'


def _text(kind: str, x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
