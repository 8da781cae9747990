"""The results as a reader sees them: the table, each student beside its rivals, distance against evaluations.

Pure functions from a report's body to what the template and the charts need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipestill.reporting import figures
from pipestill.reporting.plots import Chart, Point, Rule, Series

Run = Mapping[str, Any]
ORDER = ("heun", "2m", "euler", "renoise", "heun-churn")
MEMORISED = 0.8  # a ratio of nearest distances below this is flagged
MIXES = {"balanced": "", "data": "classes as in the data", "drawn": "classes drawn", "listed": "chosen classes"}
MARKS = {
    "best": "lowest at its number of evaluations or fewer",
    "level": "its interval reaches the lowest one's at its number of evaluations or fewer",
    "memorised": "samples lie closer to training images than held-out images do: has the model memorised?",
}


@dataclass(frozen=True)
class Column:
    """A column's head, the group that it stands under, and the key by which it sorts."""

    head: str
    group: str
    start: bool = False  # first of its group


@dataclass(frozen=True)
class Cell:
    """What a cell shows: the figure, a second line below, the value to sort by, a mark from MARKS."""

    text: str
    below: str = ""
    value: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Row:
    name: str
    below: str
    kind: str  # floor, student, teacher
    slot: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Heads of groups with the number of columns under each."""
        found: list[tuple[str, int]] = []
        for column in self.columns:
            if column.start:
                found.append((column.group, 0))
            found[-1] = (column.group, found[-1][1] + 1)
        return found

    @property
    def marks(self) -> list[str]:
        """Which marks the table uses, for its legend."""
        used = {cell.mark for row in self.rows for cell in row.cells}
        return [mark for mark in MARKS if mark in used]


def table(body: Mapping[str, Any], seconds: Mapping[str, float | None] | None = None) -> Table:
    """Floors first, then runs in the body's order; columns without any value are left out.

    `seconds` per image by run add a column of times.
    """
    runs, floors = body["runs"], body["floors"]
    entries = [*floors, *runs]
    columns: list[Column] = []
    cells: list[list[Cell]] = [[] for _ in entries]

    def add(group: str, head: str, make: Callable[[Run], Cell]) -> None:
        made = [make(entry) for entry in entries]
        if any(cell.value is not None for cell in made):
            columns.append(Column(head, group, start=not columns or columns[-1].group != group))
            for row, cell in zip(cells, made, strict=True):
                row.append(cell)

    def plain(key: str, mark: str = "", below: float | None = None) -> Callable[[Run], Cell]:
        places = figures.decimals(figures.value(entry["metrics"], key) for entry in entries)
        marks = _leaders(runs, key) if mark == "lowest" else {}

        def make(entry: Run) -> Cell:
            metrics = _metrics(entry)
            found, bounds = figures.value(metrics, key), figures.interval(metrics, key)
            text = f"[{figures.fixed(bounds[0], places)}, {figures.fixed(bounds[1], places)}]" if bounds else ""
            flag = marks.get(entry.get("name", ""), "")
            if below is not None and found is not None and found < below and "name" in entry:
                flag = mark
            return Cell(figures.fixed(found, places), text, found, flag)

        return make

    add("Cost", "Evaluations", lambda entry: _count(entry, "evaluations"))
    add("Cost", "Guidance", _guidance)
    if seconds is not None:
        columns.append(Column("Time per image", "Cost", start=not columns))
        for row, entry in zip(cells, entries, strict=True):
            taken = seconds.get(entry.get("name", ""))
            row.append(Cell(figures.duration(taken), "", taken))
    for space in body["extractors"]:
        group = figures.extractor_title(space)
        add(group, "Distance", plain(f"fd_{space}", "lowest"))
        add(group, "Excess", _excess(entries, space))
        for key, head, mark in (("kid", "KID", "lowest"), ("precision", "Precision", ""), ("recall", "Recall", "")):
            add(group, head, plain(f"{key}_{space}", mark))
    add("By class", "Accuracy", plain("class_accuracy"))
    add("By class", "Diversity", plain("diversity"))
    add("Besides", "Nearest train", plain("nearest_train_ratio", "memorised", MEMORISED))
    add("Besides", "Inception Score", plain("inception_score"))
    add("Besides", "Sigma", _sigma)
    add("Besides", "Images", lambda entry: _count(entry, "images"))
    add("Besides", "Seeds", lambda entry: _count(entry, "seeds"))
    named = series_of(runs)
    rows = [_row(entry, tuple(made), named, len(floors)) for entry, made in zip(entries, cells, strict=True)]
    return Table(tuple(columns), tuple(rows))


def _leaders(runs: Sequence[Run], key: str) -> dict[str, str]:
    """The marks of runs, each among those of its class mix."""
    marks: dict[str, str] = {}
    for mix in {run["mix"] for run in runs}:
        marks |= figures.leaders([(run["name"], _metrics(run)) for run in runs if run["mix"] == mix], key)
    return marks


def _metrics(entry: Run) -> dict[str, Any]:
    return dict(entry["metrics"]) | {"intervals": entry["intervals"]}


def _count(entry: Run, key: str) -> Cell:
    found = figures.value(entry["metrics"], key)
    return Cell(f"{found:,.0f}" if found else figures.DASH, "", found or None)


def _guidance(entry: Run) -> Cell:
    found = figures.value(entry["metrics"], "guidance") if "name" in entry else None
    return Cell(figures.short(found, 2), "", found)


def _sigma(entry: Run) -> Cell:
    if "sigma_max" not in entry:
        return Cell(figures.DASH, "", None)
    high, low = entry["sigma_max"], entry["sigma_min"]
    return Cell(" to ".join("∞" if level is None else f"{level:.3g}" for level in (high, low)), "", high or 1e9)


def _excess(entries: Sequence[Run], space: str) -> Callable[[Run], Cell]:
    places = figures.decimals(figures.value(entry["metrics"], f"fd_{space}") for entry in entries)

    def make(entry: Run) -> Cell:
        found, floor = figures.excess_of(entry["metrics"], space), figures.floor_of(entry["metrics"], space)
        if found is None or "name" not in entry:
            return Cell(figures.DASH)
        sign = "+" if found > 0 else ""
        return Cell(sign + figures.fixed(found, places), f"floor {figures.fixed(floor, places)}", found)

    return make


def _row(entry: Run, cells: tuple[Cell, ...], named: Mapping[str, tuple[str, int]], floors: int) -> Row:
    if "name" not in entry:
        count = figures.value(entry["metrics"], "images")
        images = f"{count:,.0f} training images against the test images" if count else "training against test images"
        return Row("Real against real", "; ".join([images, *_classes(entry)]), "floor", -1, cells)
    parts: list[str] = [figures.SAMPLERS.get(entry["sampler"]) or entry["sampler"]]
    if entry["steps"]:
        parts.append(f"{entry['steps']} step{'' if entry['steps'] == 1 else 's'}")
    if entry["tuned"]:
        parts.append("tuned")
    if entry["weights"] != "ema":
        parts.append(f"{entry['weights']} weights")
    below = "; ".join([", ".join(parts), *_classes(entry)])
    return Row(entry["name"], below, entry["role"], named[entry["name"]][1], cells)


def _classes(entry: Run) -> list[str]:
    """The class mix of a row where it is not balanced, and what could not be matched."""
    mix = MIXES.get(entry["mix"], entry["mix"])
    return [*([mix] if mix else []), *entry["notes"]]


def series_of(runs: Sequence[Run]) -> dict[str, tuple[str, int]]:
    """Each run's series and its slot: students together, teachers by sampler (and guidance, and name if several)."""
    teachers = sorted({run["model"] for run in runs if run["role"] == "teacher"})
    labels: dict[str, str] = {}
    for run in runs:
        label = "students"
        if run["role"] == "teacher":
            label = figures.SAMPLERS.get(run["sampler"]) or run["sampler"]
            label = f"{run['model']}, {label}" if len(teachers) > 1 else f"teacher, {label}"
            if run["guidance"] != 1:
                label += f", guidance {run['guidance']:g}"
        labels[run["name"]] = label
    rank = {
        label: (ORDER.index(run["sampler"]) if run["sampler"] in ORDER else len(ORDER), label)
        for run in runs
        for label in [labels[run["name"]]]
    }
    others = sorted({label for label in labels.values() if label != "students"}, key=lambda label: rank[label])
    slots = {label: 1 + place % 5 for place, label in enumerate(others)} | {"students": 0}
    return {name: (label, slots[label]) for name, label in labels.items()}


def distance_chart(body: Mapping[str, Any], space: str) -> Chart | None:
    """Distance against evaluations in one feature space; None where nothing was measured."""
    key = f"fd_{space}"
    named = series_of(body["runs"])
    members: dict[tuple[int, str], list[Point]] = {}
    for run in body["runs"]:
        found, spent = figures.value(run["metrics"], key), figures.value(run["metrics"], "evaluations")
        if found is None or not spent:
            continue
        label, slot = named[run["name"]]
        bounds = figures.interval(_metrics(run), key)
        tip = f"{run['name']}: {figures.short(found)} with {spent:g} evaluations"
        low, high = bounds or (None, None)
        name = run["name"] if slot == 0 else ""
        members.setdefault((slot, label), []).append(Point(spent, found, low, high, tip, name))
    if not members:
        return None
    series = tuple(
        Series(label, tuple(sorted(points, key=lambda point: (point.x, point.y))), slot, line=slot != 0)
        for (slot, label), points in sorted(members.items())
    )
    rules = tuple(_rule(floor, key, len(body["floors"]) > 1) for floor in body["floors"] if key in floor["metrics"])
    values = [point.y for one in series for point in one.points] + [rule.y for rule in rules]
    lowest = min((point for one in series for point in one.points), key=lambda point: point.y)
    one_mix = len({run["mix"] for run in body["runs"]}) == 1  # distances of different ones are not compared
    title = figures.extractor_title(space)
    return Chart(
        title=f"Distance against evaluations, {title}",
        description=f"{sum(len(one.points) for one in series)} runs in {len(series)} series."
        + (f" Lowest: {lowest.tip}." if one_mix else ""),
        x_label="evaluations an image",
        y_label=f"distance, {title}",
        series=series,
        rules=rules,
        log_x=True,
        x_ticks=tuple(dict.fromkeys(point.x for one in series for point in one.points)),
        log_y=min(values) > 0 and max(values) > 6 * min(values),
    )


def _rule(floor: Run, key: str, several: bool) -> Rule:
    found = floor["metrics"][key]
    low, high = figures.interval(_metrics(floor), key) or (None, None)
    count = f", {floor['metrics'].get('images', 0):g} images" if several else ""
    count += f", {MIXES.get(floor['mix'], floor['mix']) or 'balanced'}" if several else ""
    return Rule(found, f"real against real {figures.short(found)}{count}", low, high)


@dataclass(frozen=True)
class Bar:
    label: str
    kind: str  # student, rival, best
    text: str
    share: float  # of the longest bar, in percent


@dataclass(frozen=True)
class Duel:
    """A student's run beside the teacher's best in one feature space; `floor` is a place along the bars, in percent."""

    space: str
    bars: tuple[Bar, ...]
    floor: float | None
    ratio: str


@dataclass(frozen=True)
class Tile:
    run: str
    evaluations: float
    duels: tuple[Duel, ...]


def tiles(body: Mapping[str, Any]) -> list[Tile]:
    """One tile a student's run, in the table's order."""
    by_run: dict[str, list[Run]] = {}
    for comparison in body["comparisons"]:
        by_run.setdefault(comparison["run"], []).append(comparison)
    order = [run["name"] for run in body["runs"] if run["name"] in by_run]
    return [Tile(name, by_run[name][0]["evaluations"], tuple(map(_duel, by_run[name]))) for name in order]


def _duel(comparison: Run) -> Duel:
    same, best = comparison["same_budget"], comparison["any_budget"]
    entries = [(comparison["run"], "student", comparison["distance"])]
    if same is not None and same != best:
        entries.append(
            (f"{same['run']}, the teacher's best at {comparison['evaluations']:g} or fewer", "rival", same["distance"])
        )
    if best is not None:
        kind = "rival" if best == same else "best"
        entries.append((f"{best['run']}, the teacher's best at any number", kind, best["distance"]))
    longest = max(distance for _, _, distance in entries) or 1.0
    bars = tuple(Bar(label, kind, figures.short(found), 100 * found / longest) for label, kind, found in entries)
    floor = comparison["floor"]
    ratio = f"{figures.short(comparison['distance'] / same['distance'], 2)}×" if same and same["distance"] > 0 else ""
    return Duel(
        figures.extractor_title(comparison["extractor"]),
        bars,
        None if floor is None else min(100 * floor / longest, 100.0),
        ratio,
    )
