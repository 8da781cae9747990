"""Charts as SVG text: lines, points with intervals, and reference lines, on linear or logarithmic axes.

Pure functions. Colours come from CSS classes, so that one drawing serves light and dark pages; equal data gives equal
bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

from pipestill.reporting.axes import Axis, number, ticks

Box = tuple[float, float, float, float]  # left, top, right, bottom
BESIDE = (  # where a name may stand: anchor and offset from its point
    ("start", 9, 4),
    ("end", -9, 4),
    ("middle", 0, -11),
    ("middle", 0, 20),
    ("start", 8, -8),
    ("start", 8, 17),
    ("end", -8, -8),
    ("end", -8, 17),
)
SLOTS = 6  # series colours in chart.css; slot 0 is the students'
FONT = 12.0  # pixels
STYLE = Path(__file__).parent / "templates" / "chart.css"


@dataclass(frozen=True)
class Point:
    """One measured value, with its interval where there is one; `name` is written beside it where there is room."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    tip: str = ""
    name: str = ""


@dataclass(frozen=True)
class Series:
    """Points in order of x. `slot` picks colour and marker; a faint series is drawn thin and has no legend entry."""

    name: str
    points: tuple[Point, ...]
    slot: int = 0
    line: bool = True
    markers: bool = True
    faint: bool = False


@dataclass(frozen=True)
class Rule:
    """A horizontal reference line with its band."""

    y: float
    label: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Chart:
    """What to draw; `description` is what a screen reader says."""

    title: str
    description: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    rules: tuple[Rule, ...] = ()
    log_x: bool = False
    log_y: bool = False
    x_ticks: tuple[float, ...] = ()  # in order of importance, as many as have room; empty: round values


def svg(chart: Chart, width: float, height: float, *, standalone: bool = False) -> str:
    """The chart as one `<svg>`; `standalone` adds what a file of its own needs (name space, style, background)."""
    drawing = _Drawing(chart, width, height)
    body = "\n".join(drawing.lines)
    namespace = ' xmlns="http://www.w3.org/2000/svg"' if standalone else ""
    size = f' width="{width:g}" height="{height:g}"' if standalone else ""
    style = f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n" if standalone else ""
    return (
        f'<svg{namespace} class="chart" viewBox="0 0 {width:g} {height:g}"{size} role="img" '
        f'aria-label="{escape(chart.title + ". " + chart.description)}">\n'
        f"{style}{body}\n</svg>\n"
    )


def marker(slot: int, x: float, y: float, radius: float = 4.5) -> str:
    """The marker of a series: shapes differ as well as colours."""
    kind = f'class="mark s{slot % SLOTS}"'
    r = radius
    shapes = {
        0: f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="{r * 1.15:.1f}"/>',
        1: f'<rect {kind} x="{x - r * 0.9:.1f}" y="{y - r * 0.9:.1f}" width="{r * 1.8:.1f}" height="{r * 1.8:.1f}"/>',
        2: _polygon(kind, x, y, ((0, -1.25 * r), (1.15 * r, 0.85 * r), (-1.15 * r, 0.85 * r))),
        3: _polygon(kind, x, y, ((0, -1.35 * r), (1.35 * r, 0), (0, 1.35 * r), (-1.35 * r, 0))),
        4: _polygon(kind, x, y, ((0, 1.25 * r), (1.15 * r, -0.85 * r), (-1.15 * r, -0.85 * r))),
        5: f'<path class="mark s{slot % SLOTS} open" d="M{x - r:.1f} {y - r:.1f}l{2 * r:.1f} {2 * r:.1f}'
        f'm0 {-2 * r:.1f}l{-2 * r:.1f} {2 * r:.1f}"/>',
    }
    return shapes[slot % SLOTS]


def _polygon(kind: str, x: float, y: float, corners: Sequence[tuple[float, float]]) -> str:
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon {kind} points="{points}"/>'


def _text_width(text: str, size: float = FONT) -> float:
    return 0.57 * size * len(text)


class _Drawing:
    """Lays one chart out in pixels, from the back to the front."""

    def __init__(self, chart: Chart, width: float, height: float) -> None:
        self._chart, self._width, self._height = chart, width, height
        self.lines: list[str] = [f'<rect class="paper" width="{width:g}" height="{height:g}"/>']
        self._taken: list[Box] = []
        self._segments: list[tuple[tuple[float, float], tuple[float, float]]] = []
        top = self._legend() + 26
        self._y = _axis(chart, height - 42, top, vertical=True)
        self._y_ticks = ticks(self._y.low, self._y.high, log=self._y.log, most=max(4, int((height - top) / 46)))
        left = 14 + max(_text_width(number(tick)) for tick in self._y_ticks)
        self._x = _axis(chart, left, width - 14, vertical=False)
        self._frame()
        self._rules()
        for series in sorted(chart.series, key=lambda series: not series.faint):
            self._line(series)
        for series in reversed(chart.series):
            self._markers(series)
        for series in chart.series:
            self._names(series)

    def _add(self, line: str) -> None:
        self.lines.append(line)

    def _text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        place = f' text-anchor="{anchor}"' if anchor != "start" else ""
        name = f' class="{kind}"' if kind else ""
        self._add(f'<text{name} x="{x:.1f}" y="{y:.1f}"{place}>{escape(text)}</text>')

    def _legend(self) -> float:
        """Draws the legend from the top, wrapped; returns its lower edge."""
        shown = [series for series in self._chart.series if series.name and not series.faint]
        if len(shown) < 2:
            return 0.0
        x, y = 10.0, 15.0
        for series in shown:
            wide = 24 + _text_width(series.name) + 12
            if x > 10 and x + wide > self._width:
                x, y = 10.0, y + 20
            if series.line:
                self._add(f'<path class="line s{series.slot % SLOTS}" d="M{x:.1f} {y - 4:.1f}h18"/>')
            if series.markers:
                self._add(marker(series.slot, x + 9, y - 4))
            self._text(x + 24, y, series.name)
            x += wide
        return y + 6

    def _frame(self) -> None:
        left, right, bottom, top = self._x.start, self._x.end, self._y.start, self._y.end
        for value in self._y_ticks:
            y = self._y.place(value)
            self._add(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
            self._text(left - 6, y + 4, number(value), "tick", "end")
        for value in self._x_ticks():
            x = self._x.place(value)
            self._add(f'<path class="axis" d="M{x:.1f} {bottom:.1f}v4"/>')
            self._text(x, bottom + 17, number(value), "tick", "middle")
        self._add(f'<path class="axis" d="M{left:.1f} {bottom:.1f}H{right:.1f}"/>')
        scale = ", log scale" if self._y.log else ""
        self._text(10, top - 12, self._chart.y_label + scale, "label")
        scale = ", log scale" if self._x.log else ""
        self._text(right, bottom + 35, self._chart.x_label + scale, "label", "end")

    def _x_ticks(self) -> list[float]:
        axis = self._x
        if not self._chart.x_ticks:
            return ticks(axis.low, axis.high, log=axis.log, most=min(max(3, int((axis.end - axis.start) / 56)), 9))
        shown: list[float] = []
        for value in self._chart.x_ticks:
            if all(abs(axis.place(value) - axis.place(other)) > 22 for other in shown):
                shown.append(value)
        return shown

    def _rules(self) -> None:
        left, right = self._x.start, self._x.end
        for rule in self._chart.rules:
            if rule.low is not None and rule.high is not None:
                top, bottom = self._y.place(rule.high), self._y.place(rule.low)
                self._add(
                    f'<rect class="band" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
                    f'height="{max(bottom - top, 1):.1f}"/>'
                )
            y = self._y.place(rule.y)
            self._add(f'<path class="rule" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
            lowest = y if rule.low is None else self._y.place(rule.low)
            highest = y if rule.high is None else self._y.place(rule.high)
            text = lowest + 14 if self._y.start - lowest > 18 else highest - 5
            self._text(right - 2, text, rule.label, "rule-label", "end")
            self._taken.append((right - _text_width(rule.label), text - 12, right, text + 4))

    def _place(self, point: Point) -> tuple[float, float]:
        return self._x.place(point.x), self._y.place(point.y)

    def _line(self, series: Series) -> None:
        if series.line and len(series.points) > 1:
            corners = [self._place(point) for point in series.points]
            if not series.faint:
                self._segments += list(pairwise(corners))
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in corners)
            faint = " faint" if series.faint else ""
            self._add(f'<path class="line s{series.slot % SLOTS}{faint}" d="M{path}"/>')

    def _markers(self, series: Series) -> None:
        if not series.markers:
            return
        for point in series.points:
            x, y = self._place(point)
            if point.low is not None and point.high is not None:
                low, high = self._y.place(point.low), self._y.place(point.high)
                self._add(
                    f'<path class="whisker s{series.slot % SLOTS}" '
                    f'd="M{x:.1f} {low:.1f}V{high:.1f}M{x - 3:.1f} {low:.1f}h6M{x - 3:.1f} {high:.1f}h6"/>'
                )
            self._add(f"<g>{marker(series.slot, x, y)}<title>{escape(point.tip)}</title></g>")
            self._taken.append((x - 6, y - 6, x + 6, y + 6))

    def _names(self, series: Series) -> None:
        """Writes names beside points where they meet nothing else; a name without room is left to the tip."""
        for point in series.points:
            if not point.name:
                continue
            x, y = self._place(point)
            wide = _text_width(point.name)
            for anchor, dx, dy in BESIDE:
                left = x + dx - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
                box = (left, y + dy - 10, left + wide, y + dy + 3)
                inside = self._x.start <= box[0] and box[2] <= self._width and self._y.end - 8 <= box[1]
                inside = inside and box[3] <= self._y.start
                if inside and not any(_overlap(box, other) for other in self._taken) and not self._crossed(box):
                    self._text(x + dx, y + dy, point.name, f"name s{series.slot % SLOTS}", anchor)
                    self._taken.append(box)
                    break

    def _crossed(self, box: Box) -> bool:
        """Whether a line runs through the box, looked at every few pixels."""
        for (x0, y0), (x1, y1) in self._segments:
            steps = max(1, int(max(abs(x1 - x0), abs(y1 - y0)) / 3))
            for step in range(steps + 1):
                x, y = x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps
                if box[0] <= x <= box[2] and box[1] <= y <= box[3]:
                    return True
        return False


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _axis(chart: Chart, start: float, end: float, *, vertical: bool) -> Axis:
    """The axis that holds every point, interval and reference line, with a little room."""
    points = [point for series in chart.series for point in series.points]
    if vertical:
        values = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
        values += [value for rule in chart.rules for value in (rule.y, rule.low, rule.high) if value is not None]
    else:
        values = [point.x for point in points]
    log = chart.log_y if vertical else chart.log_x
    if log:
        values = [value for value in values if value > 0]
    values = values or [1.0]
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** 0.06, 1.12)
        return Axis(low / room, high * room, start, end, log=True)
    room = 0.06 * (high - low) or abs(high) or 1.0
    if vertical and low >= 0 and low < 0.4 * high:
        return Axis(0.0, high + room, start, end, log=False)
    return Axis(low - room * vertical, high + room * (vertical or low == high), start, end, log=False)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving mean over `window` values, shorter at the ends."""
    half = window // 2
    out = []
    for index in range(len(values)):
        near = values[max(0, index - half) : index + half + 1]
        out.append(math.fsum(near) / len(near))
    return out
