"""Curves: figures over updates as CSV rows, the same bytes for the same training however it was interrupted."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

POINTS = 200  # rows of losses that a whole training leaves


class Curves:
    """Loss rows are means over windows of updates; validation rows stand at their own step."""

    def __init__(self, updates: int) -> None:
        self._window = max(1, updates // POINTS)
        self._pending: dict[str, list[float]] = {}
        self._count = 0
        self.rows: list[dict[str, float]] = []

    def add(self, step: int, figures: dict[str, float]) -> None:
        """One update's figures; `step` counts updates done."""
        for name, value in figures.items():
            self._pending.setdefault(name, []).append(value)
        self._count += 1
        if self._count == self._window:
            means = {name: math.fsum(values) / len(values) for name, values in self._pending.items()}
            self.rows.append({"step": step} | means)
            self._pending, self._count = {}, 0

    def mark(self, step: int, figures: dict[str, float]) -> None:
        """A row of its own (validation)."""
        self.rows.append({"step": step} | figures)

    def last(self) -> dict[str, float]:
        """Each figure's last value, six significant digits."""
        values: dict[str, float] = {}
        for row in self.rows:
            values |= row
        return {name: float(f"{value:.6g}") for name, value in values.items() if name != "step"}

    def state(self) -> dict[str, Any]:
        return {"pending": self._pending, "count": self._count, "rows": self.rows}

    def load(self, state: dict[str, Any]) -> None:
        self._pending, self._count, self.rows = state["pending"], state["count"], state["rows"]

    def write(self, path: Path) -> None:
        """Writes CSV with `step` first, then every figure in order of first appearance; six significant digits."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({name: value if name == "step" else f"{value:.6g}" for name, value in row.items()})
        path.write_text(text.getvalue(), encoding="utf-8")
