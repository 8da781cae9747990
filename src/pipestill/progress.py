"""What a person sees while waiting: a bar on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

from pipestill.durations import duration
from pipestill.terminal import coloured

Item = TypeVar("Item")
QUIET = "PIPESTILL_QUIET"  # variable: set, only warnings and errors are printed
LINE_EVERY = 5.0  # seconds between lines where no terminal is


_shown: list[Bar] = []  # the bar that was advanced last, for whoever asks how far this process is


def current() -> dict[str, Any] | None:
    """How far the work that is shown is: label, done, total, unit, rate in units a second, figures; None before any."""
    return _shown[0].facts() if _shown else None


class Bar:
    """A bar with rate and time left; `show=False` (ranks other than the leader) prints nothing.

    The unit `B` is for bytes, which are shown in megabytes.
    """

    def __init__(self, label: str, total: int, *, done: int = 0, unit: str = "it", show: bool = True) -> None:
        self._label, self._total, self._unit, self._show = label, total, unit, show
        self._prints = show and not is_quiet()
        self._done = self._first = done
        self._started = self._last_line = time.monotonic()
        self._figures = ""
        self._bar = None
        if self._prints and sys.stderr.isatty():
            self._bar = tqdm(
                desc=label, total=total, initial=done, unit=unit, unit_scale=unit == "B", dynamic_ncols=True
            )

    def advance(self, count: int = 1, **figures: float) -> None:
        """Counts `count` more as done and shows the figures beside it."""
        self._done += count
        if self._show:
            _shown[:] = [self]
        if figures:
            self._figures = " ".join(f"{name}={value:.4g}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures, refresh=False)
            self._bar.update(count)
        elif self._prints and time.monotonic() - self._last_line >= LINE_EVERY:
            self._line()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._prints:
            self._line()

    def _rate(self) -> float:
        return (self._done - self._first) / max(time.monotonic() - self._started, 1e-9)

    def facts(self) -> dict[str, Any]:
        return {
            "label": self._label,
            "done": self._done,
            "total": self._total,
            "unit": self._unit,
            "rate": self._rate(),
            "figures": self._figures,
        }

    def _line(self) -> None:
        self._last_line = time.monotonic()
        rate = self._rate()
        left = max(self._total - self._done, 0) / rate if rate else 0.0
        share = 100 * self._done / max(self._total, 1)
        done, total, unit = f"{self._done}", f"{self._total}", self._unit
        if unit == "B":
            done, total, unit, rate = f"{self._done / 1e6:.1f}", f"{self._total / 1e6:.1f}", "MB", rate / 1e6
        print(
            f"{self._label}: {done}/{total} ({share:.0f}%), {rate:.4g} {unit}/s, "
            f"{duration(left)} left {self._figures}".rstrip(),
            file=sys.stderr,
            flush=True,
        )


def track(items: Iterable[Item], label: str, total: int, *, unit: str = "it", show: bool = True) -> Iterator[Item]:
    """Yields the items, counting each on a bar when it has been worked on."""
    bar = Bar(label, total, unit=unit, show=show)
    try:
        for item in items:
            yield item
            bar.advance()
    finally:
        bar.close()


def say(message: str) -> None:
    """One plain line for a person, on standard error; --quiet leaves it out."""
    if not is_quiet():
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """As `say`, for what a person has to know: --quiet prints it too."""
    print(coloured(message, "yellow", sys.stderr), file=sys.stderr, flush=True)


def is_quiet() -> bool:
    """Whether only warnings and errors are printed."""
    return bool(os.environ.get(QUIET))


@contextmanager
def quiet(wanted: bool) -> Iterator[None]:
    """Prints only warnings and errors within, in this process and those that it starts."""
    before = os.environ.get(QUIET)
    if wanted:
        os.environ[QUIET] = "1"
    try:
        yield
    finally:
        if wanted and before is None:
            del os.environ[QUIET]
