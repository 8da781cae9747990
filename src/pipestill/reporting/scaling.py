"""What measurements of a training say: efficiencies, shares of time, what holds it up in words, and the page of it.

Pure functions of rows as `commands/bench.py` keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipestill import __version__
from pipestill.reporting import plots
from pipestill.reporting.page import NARROW, WIDE, Drawing, environment, stylesheet
from pipestill.reporting.plots import Chart, Point, Series

Row = Mapping[str, Any]

ADVICE = {
    "data": "keep the decoded images nearer: operation.cache=device, or host",
    "forward": "the network itself: precision=bf16 and compile on a GPU; on a CPU, more cores a rank (threads)",
    "backward": "the network itself: precision=bf16 and compile on a GPU; on a CPU, more cores a rank (threads)",
    "collectives": "gradients are exchanged once an update: more images a rank, or training.accumulation, help",
    "optimizer": "every rank steps all weights, however small its share of the batch: more images a rank",
    "ema": "every rank averages all weights, however small its share of the batch: more images a rank",
    "other": "figures, condition and start-up of each update: more images a rank",
}
NOTABLE = 0.1  # a share of an update from which a phase that is not the network is named
PREVIEWS = 200  # updates between previews, as an example
NOISY = 1.25  # rounds that differ by this factor were not measured on a quiet machine


@dataclass(frozen=True)
class Scaled:
    """One measurement beside that of one rank. `shares` of the update's phases add up to 1."""

    row: Row
    efficiency: float
    shares: dict[str, float]


def scaled(rows: Sequence[Row]) -> list[Scaled]:
    """Each row with its efficiency: images a second over ranks times those of the fewest ranks, a rank."""
    found = []
    for row in rows:
        first = min((other for other in rows if other["scaling"] == row["scaling"]), key=lambda other: other["ranks"])
        ideal = first["images_per_second"] * row["ranks"] / first["ranks"]
        known = sum(row["phases"].values())
        whole = max(known, row["seconds"])
        shares = {name: seconds / whole for name, seconds in row["phases"].items()}
        found.append(Scaled(row, row["images_per_second"] / ideal, shares | {"other": (whole - known) / whole}))
    return found


def words(rows: Sequence[Row]) -> list[str]:
    """What holds the training up, most important first, each with its remedy."""
    said = []
    for scaling in ("strong", "weak"):
        own = sorted((row for row in rows if row["scaling"] == scaling), key=lambda row: row["ranks"])
        if len(own) > 1:
            said.append(_lost(own[0], own[-1]))
    base = min(scaled(rows), key=lambda each: each.row["ranks"])
    ranks = base.row["ranks"]
    for name, share in sorted(base.shares.items(), key=lambda pair: -pair[1]):
        if name not in ("forward", "backward") and share >= NOTABLE:
            said.append(f"On {_ranks(ranks)}, {share:.0%} of an update is {name}: {ADVICE[name]}.")
    network = base.shares["forward"] + base.shares["backward"]
    said.append(f"On {_ranks(ranks)}, {network:.0%} of an update is the network's own forward and backward pass.")
    most = max(rows, key=lambda row: row["ranks"])
    shown = most["preview"] / (most["preview"] + PREVIEWS * most["seconds"])
    said.append(
        f"A preview of {most['preview_items']} pictures takes {1e3 * most['preview']:.3g} ms on "
        f"{_ranks(most['ranks'])}: one every {PREVIEWS} updates is {shown:.1%} of the time."
    )
    noisy = max(row["spread"] for row in rows)
    if noisy > NOISY:
        said.append(f"Rounds of one measurement differ by a factor of {noisy:.2f}: other work ran beside it.")
    return said


def _lost(first: Row, last: Row) -> str:
    """Where the time goes that the larger number of ranks loses."""
    scaling, factor = last["scaling"], last["ranks"] / first["ranks"]
    expected = first["seconds"] / factor if scaling == "strong" else first["seconds"]
    efficiency = expected / last["seconds"]
    begin = f"{scaling.capitalize()} scaling from {_ranks(first['ranks'])} to {last['ranks']}: {efficiency:.0%}"
    speeds = f"{first['images_per_second']:.4g} to {last['images_per_second']:.4g} images/s"
    lost = {
        name: last["phases"][name] - seconds / (factor if scaling == "strong" else 1)
        for name, seconds in first["phases"].items()
    }
    excess = last["seconds"] - expected
    if excess <= 0.02 * last["seconds"]:
        return f"{begin} ({speeds}): nothing is lost."
    name = max(lost, key=lambda each: lost[each])
    why = ADVICE[name]
    if name in ("forward", "backward"):
        why = "ranks share what one had to itself (cores, caches, memory bandwidth), or smaller shares use it less well"
    return (
        f"{begin} ({speeds}). Of the {1e3 * excess:.3g} ms that an update loses, {1e3 * lost[name]:.3g} ms are "
        f"{name}: {why}."
    )


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def charts(rows: Sequence[Row]) -> list[Chart]:
    """Images a second over ranks, and efficiency over ranks, each kind of scaling a line."""
    found = scaled(rows)
    kinds = [kind for kind in ("strong", "weak") if any(each.row["scaling"] == kind for each in found)]
    ranks = sorted({each.row["ranks"] for each in found})

    def series(value: str) -> tuple[Series, ...]:
        lines = []
        for slot, kind in enumerate(kinds):
            own = sorted((each for each in found if each.row["scaling"] == kind), key=lambda each: each.row["ranks"])
            points = tuple(
                Point(each.row["ranks"], each.efficiency if value == "efficiency" else each.row[value]) for each in own
            )
            lines.append(Series(kind, points, slot))
        return tuple(lines)

    first = min(found, key=lambda each: each.row["ranks"]).row
    ideal = tuple(Point(count, first["images_per_second"] * count / first["ranks"]) for count in ranks)
    return [
        Chart(
            title="Throughput",
            description="Images a second over the number of ranks, strong and weak scaling beside the ideal",
            x_label="ranks",
            y_label="images a second",
            series=(*series("images_per_second"), Series("ideal", ideal, 3, markers=False)),
            x_ticks=tuple(map(float, ranks)),
        ),
        Chart(
            title="Efficiency",
            description="Images a second over those of the fewest ranks times their multiple",
            x_label="ranks",
            y_label="efficiency",
            series=series("efficiency"),
            x_ticks=tuple(map(float, ranks)),
        ),
    ]


def render(body: Mapping[str, Any]) -> str:
    """The page of measurements `body["rows"]` and what they were made with."""
    rows = body["rows"]
    drawings = [
        Drawing(chart.title, Markup(plots.svg(chart, *WIDE)), Markup(plots.svg(chart, *NARROW)))
        for chart in charts(rows)
    ]
    return (
        environment()
        .get_template("scaling.html.jinja")
        .render(
            body=body,
            version=__version__,
            css=stylesheet(),
            rows=scaled(rows),
            words=words(rows),
            drawings=drawings,
            phases=[*rows[0]["phases"], "other"],
        )
    )
