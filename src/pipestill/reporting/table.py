"""The results as a small table for terminals, read from the metrics files; imports nothing heavy.

If there is a params.yaml beside the folder of metrics, the table is that of its runs, and a file counts only if it
belongs to the artefacts that are there now.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipestill import config
from pipestill.config import Params
from pipestill.errors import InputError
from pipestill.progress import warn
from pipestill.reporting import figures
from pipestill.reporting.current import FLOOR, Current
from pipestill.work import read_record

TIME = "per image"
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Columns, each its head and one cell per run, the runs' names first; and for each run why it does not count."""

    columns: list[tuple[str, list[str]]]
    notes: list[str | None]


def results_table(folder: Path) -> str:
    """The table over `<folder>/<run>.json` as text, the floor first, then by falling number of evaluations.

    Raises InputError if the folder has no metrics of those runs or a file cannot be read.
    """
    return _render(table(folder))


def table(folder: Path, *, judge: bool = True) -> Table:
    """The table over `<folder>/<run>.json`. What it leaves out is named on standard error.

    `judge=False` trusts the files, for a checkout without artefacts.
    """
    params = _params_beside(folder)
    others = _strays(folder, params)
    if others:
        warn(f"left out, params.yaml has no such run: {', '.join(file.stem for file in others)}")
    runs = {file.stem: _read(file) for file in sorted(folder.glob("*.json")) if file not in others}
    if not runs:
        which = " of the runs in params.yaml" if others else ""
        raise InputError(f"{folder} has no metrics{which} (*.json): run pipestill evaluate with --metrics first")
    notes: dict[str, str] = {}
    seconds: dict[str, float | None] = {}
    if params is not None and judge:
        current = Current(_project(folder), params)
        for name, body in runs.items():
            problem = current.metrics_problem(name, body)
            if problem is not None:
                notes[name] = problem
                runs[name] = {}
            elif name != FLOOR:
                seconds[name] = _seconds(current.sampling_key(name))
    return _made(runs, notes, seconds)


def _made(runs: dict[str, Metrics], notes: dict[str, str], seconds: dict[str, float | None]) -> Table:
    spaces = figures.extractors(runs.values())
    order = sorted(runs, key=lambda name: _place(name, runs[name], spaces))
    made = [("", [_title(name) for name in order])]
    made.append(("evaluations", [_whole(runs[name].get("evaluations")) for name in order]))
    if any(runs[name].get("guidance", 1) != 1 for name in order if name != FLOOR):
        made.append(("guidance", [figures.short(figures.value(runs[name], "guidance"), 2) for name in order]))
    wanted = [*(f"fd_{space}" for space in spaces), "class_accuracy", "diversity"]
    found = [key for key in wanted if any(key in metrics for metrics in runs.values())]
    made += [(key, _column(runs, order, key)) for key in found]
    mixes = [figures.class_mix(runs[name]) for name in order]
    if any(mix not in ("", "balanced") for mix in mixes):
        made.append(("class mix", [mix or figures.DASH for mix in mixes]))
    if any(value is not None for value in seconds.values()):
        made.append((TIME, [figures.duration(seconds.get(name)) for name in order]))
    return Table(made, [notes.get(name) for name in order])


def strays(folder: Path) -> list[Path]:
    """Metrics files of runs that the params.yaml beside the folder does not name; none if there is no such file.

    Raises InputError if it is not valid.
    """
    return _strays(folder, _params_beside(folder))


def _strays(folder: Path, params: Params | None) -> list[Path]:
    if params is None:
        return []
    return [file for file in sorted(folder.glob("*.json")) if file.stem not in {FLOOR, *params.sampling.runs}]


def _project(folder: Path) -> Path:
    return Path(os.path.abspath(folder)).parent


def _params_beside(folder: Path) -> Params | None:
    path = _project(folder) / "params.yaml"
    return config.load(path) if path.exists() else None


def _seconds(key: str | None) -> float | None:
    """Seconds per image, if this machine made the samples."""
    return None if key is None else figures.value(read_record("sample", key), "seconds_per_image")


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


def _render(table: Table) -> str:
    widths = [max(map(len, [head, *cells])) for head, cells in table.columns]
    lines = ["  ".join(_cell(head, widths, place) for place, (head, _) in enumerate(table.columns))]
    lines.append("─" * len(lines[0]))
    for row, note in enumerate(table.notes):
        cells = "  ".join(_cell(cells[row], widths, place) for place, (_, cells) in enumerate(table.columns))
        lines.append(cells.rstrip() if note is None else f"{cells}  not current: {note}")
    return "\n".join(lines) + "\n"


def _cell(text: str, widths: list[int], place: int) -> str:
    return text.ljust(widths[place]) if place == 0 else text.rjust(widths[place])
