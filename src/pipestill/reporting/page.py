"""The report's page: one HTML file with everything inside, from a report's body, its pictures and the timings."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipestill import __version__
from pipestill.reporting import chain, figures, plots, results
from pipestill.reporting.plots import Chart, Point, Series

TEMPLATES = Path(__file__).parent / "templates"
WIDE, NARROW, SMALL = (1040, 400), (340, 340), (330, 200)
CURVE_POINTS = 160  # drawn points of a curve at most
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Local:
    """What only this machine knows: seconds per image of runs, seconds of the work behind each artefact, previews."""

    runs: Mapping[str, float | None] = field(default_factory=dict)
    artefacts: Mapping[str, float | None] = field(default_factory=dict)
    previews: Mapping[str, Sequence[Preview]] = field(default_factory=dict)  # by model, in order of updates


@dataclass(frozen=True)
class Preview:
    """A picture made during a training."""

    step: int
    png: bytes


@dataclass(frozen=True)
class Drawing:
    """One chart for wide pages and one for phones."""

    title: str
    wide: Markup
    narrow: Markup


def environment() -> Environment:
    """What renders this package's pages: strict about names, and all text is escaped."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def stylesheet() -> Markup:
    """The style of a page with charts."""
    return Markup(
        (TEMPLATES / "page.css").read_text(encoding="utf-8") + (TEMPLATES / "chart.css").read_text(encoding="utf-8")
    )


def render(body: Mapping[str, Any], files: Mapping[str, bytes], local: Local | None = None) -> str:
    """The page. `files` holds the pictures that `body["grids"]` names.

    Without `local` equal artefacts give equal bytes; with it the page also shows times and previews.
    """
    templates = environment()
    templates.filters |= {
        "short": figures.short,
        "duration": figures.duration,
        "bytes": _bytes,
        "picture": lambda name: _data_uri(name, files[name]),
        "png": lambda content: _data_uri("preview.png", content),
        "flat": flat,
        "findings": findings,
        "marker": lambda slot: Markup(plots.marker(slot, 8, 8, 5)),
        "words": lambda text: str(text).replace("_", " "),
    }
    return templates.get_template("report.html.jinja").render(
        body=body,
        version=__version__,
        css=stylesheet(),
        script=Markup((TEMPLATES / "page.js").read_text(encoding="utf-8")),
        table=results.table(body, None if local is None else local.runs),
        marks=results.MARKS,
        tiles=results.tiles(body),
        distances=distances(body),
        validation=validation_drawing(body["models"]),
        models=[(model, [_small(chart) for chart in loss_charts(model)]) for model in body["models"]],
        meanings=[meaning for meaning in figures.MEANINGS if local is not None or meaning is not figures.TIME],
        extractor_title=figures.extractor_title,
        classes=class_rows(body["dataset"]),
        chain=chain.groups(body["chain"]),
        local=local,
        dash=figures.DASH,
    )


def chart_files(body: Mapping[str, Any]) -> dict[str, str]:
    """Distance against evaluations in each feature space as SVG files that stand alone."""
    charts = {space: results.distance_chart(body, space) for space in body["extractors"]}
    return {space: plots.svg(chart, 760, 420, standalone=True) for space, chart in charts.items() if chart is not None}


def distances(body: Mapping[str, Any]) -> list[Drawing]:
    charts = [results.distance_chart(body, space) for space in body["extractors"]]
    return [_drawing(chart) for chart in charts if chart is not None]


def _drawing(chart: Chart) -> Drawing:
    return Drawing(chart.title, Markup(plots.svg(chart, *WIDE)), Markup(plots.svg(chart, *NARROW)))


def _small(chart: Chart) -> Markup:
    return Markup(plots.svg(chart, *SMALL))


def validation_drawing(models: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """Validation distance of every student over its updates, the kept checkpoint named; None where there is none."""
    series: list[Series] = []
    for model in models:
        curve = model["curves"].get("validation_distance")
        if curve and model["role"] == "student":
            points = [
                Point(
                    step,
                    found,
                    tip=f"{model['name']}, update {step}: {figures.short(found)}",
                    name="kept" if step == model["best_step"] else "",
                )
                for step, found in curve
            ]
            series.append(Series(model["name"], tuple(points), len(series)))
    if not series:
        return None
    values = [point.y for one in series for point in one.points]
    return _drawing(
        Chart(
            title="Validation distance while distilling",
            description=f"{len(series)} students; lowest {figures.short(min(values))}.",
            x_label="generator updates",
            y_label="validation distance",
            series=tuple(series),
            log_y=min(values) > 0 and max(values) > 12 * min(values),
        )
    )


def loss_charts(model: Mapping[str, Any]) -> list[Chart]:
    """One small chart a figure; a `validation_` figure stands with the one that it validates."""
    curves = model["curves"]
    charts = []
    for column, curve in curves.items():
        validated = column.removeprefix("validation_")
        if column != validated and (validated in curves or (model["role"] == "student" and validated == "distance")):
            continue
        series = _curve_series(column, curve)
        if column == validated and f"validation_{column}" in curves:
            points = tuple(Point(step, found) for step, found in curves[f"validation_{column}"])
            series.append(Series("validation", points, 0, markers=len(points) < 3))
        values = [point.y for one in series for point in one.points]
        charts.append(
            Chart(
                title=column.replace("_", " "),
                description=f"{model['name']}: from {figures.short(curve[0][1])} to {figures.short(curve[-1][1])} "
                f"in {curve[-1][0]} updates.",
                x_label="updates",
                y_label=column.replace("_", " "),
                series=tuple(series),
                log_y=min(values) > 0 and max(values) > 20 * min(values),
            )
        )
    return charts


def _curve_series(name: str, curve: Sequence[Sequence[float]]) -> list[Series]:
    """The curve as measured, thin, under its moving mean; short curves as they are."""
    every = -(-len(curve) // CURVE_POINTS)
    values = [found for _, found in curve]
    drawn = tuple(Point(step, found) for step, found in list(curve)[::every])
    if len(curve) < 40:
        return [Series(name, drawn, 1, markers=False)]
    means = plots.smooth(values, max(len(values) // 20, 3))
    smoothed = tuple(Point(curve[index][0], means[index]) for index in range(0, len(curve), every))
    return [Series("", drawn, 1, markers=False, faint=True), Series(name, smoothed, 1, markers=False)]


def class_rows(dataset: Mapping[str, Any]) -> list[tuple[str, int, list[tuple[str, int, float]]]]:
    """(class, images, [(part, count, percent of the largest class)]) for every class."""
    names = dataset["classes"] or ["all images"]
    parts = [part for part in PARTS if part in dataset["split"]]
    totals = [sum(dataset["split"][part][row] for part in parts) for row in range(len(names))]
    largest = max([*totals, 1])
    return [
        (
            name,
            totals[row],
            [(part, dataset["split"][part][row], 100 * dataset["split"][part][row] / largest) for part in parts],
        )
        for row, name in enumerate(names)
    ]


def flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested plain values as (full.name, text) pairs."""
    if isinstance(value, Mapping) and value:
        return [pair for key in value for pair in flat(value[key], f"{name}.{key}" if name else str(key))]
    if isinstance(value, (list, tuple)) and any(isinstance(entry, (Mapping, list)) for entry in value):
        return [pair for place, entry in enumerate(value) for pair in flat(entry, f"{name}[{place}]")]
    if isinstance(value, (list, tuple)):
        return [(name, ", ".join(map(str, value)) or "none")]
    if value is None or value == {}:
        return [(name, "none")]
    if isinstance(value, bool):
        return [(name, str(value).lower())]
    return [(name, f"{value:.6g}" if isinstance(value, float) else str(value))]


def findings(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the dataset's validation found, in a reader's words; what it did not look at is left out."""
    if not found:
        return [("validation", "no report in this dataset")]
    exact, near, sizes = found["duplicates"]["exact"], found["duplicates"]["near"], found["sizes"]
    ranks = [
        (head, ", ".join(f"{entry['name']} ({entry['count']:,})" for entry in entries[:4]))
        for head, entries in (("modes", found["modes"]), ("sizes", sizes["commonest"]))
    ]
    return [
        ("images kept", f"{found['images']:,}"),
        ("set aside", f"{found['bad']['count']:,}"),
        *ranks,
        ("distinct sizes", f"{sizes['distinct']:,}"),
        ("enlarged to fit", f"{sizes['enlarged']:,}"),
        ("rotated by EXIF", f"{found['exif_rotated']['count']:,}"),
        ("exact repeats", f"{exact['repeats']:,}, {exact['across_parts']:,} across parts"),
        (f"near pairs, {near['bits']} bits", f"{near['pairs']:,}, {near['across_parts']:,} across parts"),
        ("class imbalance", f"{found['imbalance']:g}"),
    ]


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    raise AssertionError


def _data_uri(name: str, content: bytes) -> str:
    return f"data:image/{name.rpartition('.')[2]};base64,{base64.b64encode(content).decode()}"
