"""The results as a small table for terminals, read from the metrics files alone; imports nothing heavy.

Where a params.yaml lies beside the folder of metrics, the table is that of its runs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pipestill import config
from pipestill.errors import InputError
from pipestill.progress import warn
from pipestill.reporting import figures

FLOOR = "floor"


def results_table(folder: Path) -> str:
    """The table over `<folder>/<run>.json`, the floor first, then by falling number of evaluations.

    Raises InputError where the folder holds no metrics of those runs or a file cannot be read.
    """
    return _render(columns(folder))


def columns(folder: Path) -> list[tuple[str, list[str]]]:
    """The table's columns, each its head and its cells, one cell a run; the first names the runs.

    Names on standard error what it leaves out.
    """
    others = strays(folder)
    if others:
        warn(f"left out, for params.yaml does not name them: {', '.join(file.stem for file in others)}")
    runs = {file.stem: _read(file) for file in sorted(folder.glob("*.json")) if file not in others}
    if not runs:
        which = " of the runs that params.yaml names" if others else ""
        raise InputError(f"{folder} holds no metrics{which} (*.json): run pipestill evaluate with --metrics first")
    spaces = figures.extractors(runs.values())
    order = sorted(runs, key=lambda name: _place(name, runs[name], spaces))
    made = [("", [_title(name) for name in order])]
    made.append(("evaluations", [_whole(runs[name].get("evaluations")) for name in order]))
    if any(runs[name].get("guidance", 1) != 1 for name in order if name != FLOOR):
        made.append(("guidance", [figures.short(figures.value(runs[name], "guidance"), 2) for name in order]))
    wanted = [*(f"fd_{space}" for space in spaces), "class_accuracy", "diversity"]
    found = [key for key in wanted if any(key in metrics for metrics in runs.values())]
    made += [(key, _column(runs, order, key)) for key in found]
    times = [figures.duration(figures.value(runs[name], "seconds_per_image") or None) for name in order]
    made.append(("an image", times))
    return made


def strays(folder: Path) -> list[Path]:
    """Metrics files of runs that the params.yaml beside the folder does not name; none where no such file lies there.

    Raises InputError where it is not in order.
    """
    params = Path(os.path.abspath(folder)).parent / "params.yaml"
    if not params.exists():
        return []
    named = {FLOOR, *config.load(params).sampling.runs}
    return [file for file in sorted(folder.glob("*.json")) if file.stem not in named]


def _read(file: Path) -> dict[str, Any]:
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON ({error}): run pipestill evaluate again") from error
    if not isinstance(body, dict):
        raise InputError(f"{file} holds no metrics: run pipestill evaluate again")
    return body


def _place(name: str, metrics: dict[str, Any], spaces: list[str]) -> tuple[bool, float, float, str]:
    distance = figures.value(metrics, f"fd_{spaces[0]}") if spaces else None
    return name != FLOOR, -(figures.value(metrics, "evaluations") or 0), distance or 0.0, name


def _title(name: str) -> str:
    return "real against real" if name == FLOOR else name


def _whole(found: Any) -> str:
    return f"{found:g}" if isinstance(found, (int, float)) and found else figures.DASH


def _column(runs: dict[str, dict[str, Any]], order: list[str], key: str) -> list[str]:
    values = [figures.value(runs[name], key) for name in order]
    places = figures.decimals(values)
    return [figures.fixed(found, places) for found in values]


def _render(columns: list[tuple[str, list[str]]]) -> str:
    widths = [max(map(len, [head, *cells])) for head, cells in columns]
    lines = ["  ".join(_cell(head, widths, place) for place, (head, _) in enumerate(columns))]
    lines.append("─" * len(lines[0]))
    lines += [
        "  ".join(_cell(cells[row], widths, place) for place, (_, cells) in enumerate(columns)).rstrip()
        for row in range(len(columns[0][1]))
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str, widths: list[int], place: int) -> str:
    return text.ljust(widths[place]) if place == 0 else text.rjust(widths[place])
