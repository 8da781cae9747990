"""What DVC plots, as CSV files of the report: a row a run, and a file a curve and model. Pure functions of the body."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any


def plot_files(body: Mapping[str, Any]) -> dict[str, bytes]:
    """Files by name: `plots/distances.csv` and `plots/<curve>/<model>.csv`, the latter with the column `step` first."""
    files = {"plots/distances.csv": _distances(body)}
    for model in body["models"]:
        for column, points in model["curves"].items():
            rows = ((f"{step:g}", f"{value:.6g}") for step, value in points)
            files[f"plots/{column}/{model['name']}.csv"] = _csv(("step", column), rows)
    return files


def _distances(body: Mapping[str, Any]) -> bytes:
    names = [f"fd_{extractor}" for extractor in body["extractors"]]
    rows = []
    for run in body["runs"]:
        figures = run["metrics"]
        distances = (f"{figures[name]:.6g}" if name in figures else "" for name in names)
        rows.append([run["name"], f"{figures['evaluations']:g}", *distances])
    return _csv(("run", "evaluations", *names), rows)


def _csv(head: Iterable[str], rows: Iterable[Iterable[str]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue().encode()
