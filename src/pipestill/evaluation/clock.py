"""Seconds of each part of a stage, for the run's record. Nothing depends on them."""

from __future__ import annotations

import time


class Clock:
    """`mark(name)` books the seconds since the last mark."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def mark(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._last = round(now - self._last, 3), now
