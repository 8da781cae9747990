"""Charts: where values land, which ticks stand, what is written and what is left out, equal bytes for equal data."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from pipestill.reporting import axes, plots
from pipestill.reporting.axes import Axis
from pipestill.reporting.plots import Chart, Point, Rule, Series

SVG = "{http://www.w3.org/2000/svg}"


def chart(**changes: object) -> Chart:
    body: dict[str, object] = {
        "title": "Distance",
        "description": "Two series.",
        "x_label": "evaluations",
        "y_label": "distance",
        "series": (
            Series("students", (Point(10, 2.0, 1.8, 2.2, "a <b>", "student-10"),), 0, line=False),
            Series("teacher", (Point(4, 8.0), Point(79, 1.5)), 1),
        ),
        "rules": (Rule(1.0, "floor", 0.9, 1.1),),
        "log_x": True,
    }
    return Chart(**(body | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0.0, 1.0, False, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (3.2, 19.0, False, [5.0, 10.0, 15.0]),
        (-2.0, 2.0, False, [-2.0, -1.0, 0.0, 1.0, 2.0]),
        (0.9, 60.0, True, [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]),
        (1e-4, 1e4, True, [1e-4, 1e-2, 1.0, 100.0, 1e4]),
    ],
)
def test_ticks_are_round_values_inside_the_range(low: float, high: float, log: bool, expected: list[float]) -> None:
    assert axes.ticks(low, high, log=log, most=6) == pytest.approx(expected)


def test_axes_place_values_linearly_and_by_logarithm_and_clip() -> None:
    assert Axis(0, 10, 100, 200, log=False).place(2.5) == 125
    assert Axis(1, 100, 0, 300, log=True).place(10) == pytest.approx(150)
    assert Axis(1, 100, 0, 300, log=True).place(0) == 0
    assert Axis(0, 10, 100, 200, log=False).place(99) == 200


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (79, "79"), (0.25, "0.25"), (20_000, "20k"), (3e6, "3M"), (0.0002, "2e-4")]
)
def test_numbers_are_as_short_as_they_can_be(value: float, text: str) -> None:
    assert axes.number(value) == text


def test_a_file_of_its_own_is_well_formed_and_carries_its_style() -> None:
    text = plots.svg(chart(), 700, 400, standalone=True)
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert root.get("aria-label") == "Distance. Two series."
    assert "prefers-color-scheme: dark" in text
    assert [node.text for node in root.iter(f"{SVG}title")][-1] == "a <b>"


def test_points_stand_where_their_values_say() -> None:
    root = ElementTree.fromstring(plots.svg(chart(series=chart().series[1:], rules=()), 700, 400, standalone=True))
    (line,) = [node for node in root.iter(f"{SVG}path") if node.get("class") == "line s1"]
    (x0, y0), (x1, y1) = [tuple(map(float, pair.split())) for pair in (line.get("d") or "")[1:].split("L")]
    ticks = {node.text: float(node.get("x", "nan")) for node in root.iter(f"{SVG}text") if node.get("class") == "tick"}
    scale = (x1 - x0) / math.log(79 / 4)
    assert ticks["10"] == pytest.approx(x0 + scale * math.log(10 / 4), abs=0.2)
    assert y1 > y0, "a smaller distance stands lower"


def test_names_never_cover_each_other() -> None:
    crowd = Series("students", tuple(Point(10, 2 + 0.01 * i, name=f"student-{i}") for i in range(30)), 0, line=False)
    root = ElementTree.fromstring(plots.svg(chart(series=(crowd,)), 340, 340, standalone=True))
    named = [node for node in root.iter(f"{SVG}text") if (node.get("class") or "").startswith("name")]
    places = sorted(float(node.get("y", "nan")) for node in named)
    assert 0 < len(named) < 30
    same_side: dict[str | None, list[float]] = {}
    for node in named:
        same_side.setdefault(node.get("text-anchor"), []).append(float(node.get("y", "nan")))
    assert all(b - a >= 13 for side in same_side.values() for a, b in zip(sorted(side), sorted(side)[1:], strict=False))
    assert places


def test_wished_ticks_give_way_in_order_of_importance() -> None:
    text = plots.svg(chart(x_ticks=(10, 79, 9, 4)), 340, 340)
    shown = re.findall(r'<text class="tick" x="[\d.]+" y="[\d.]+" text-anchor="middle">([^<]+)<', text)
    assert shown == ["10", "79", "4"]


def test_a_single_value_and_an_empty_series_can_be_drawn() -> None:
    ElementTree.fromstring(
        plots.svg(chart(series=(Series("one", (Point(3, 3),)),), rules=()), 300, 200, standalone=True)
    )
    ElementTree.fromstring(
        plots.svg(chart(series=(Series("none", ()),), rules=(), log_x=False), 300, 200, standalone=True)
    )


def test_equal_charts_have_equal_bytes() -> None:
    assert plots.svg(chart(), 700, 400) == plots.svg(chart(), 700, 400)


def test_smoothing_is_a_centred_mean() -> None:
    assert plots.smooth([1.0, 4.0, 7.0, 10.0], 3) == [2.5, 4.0, 7.0, 8.5]
