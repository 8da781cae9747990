"""Being asked to stop: signals, a deadline and the end of a job, remembered until a loop at a step boundary asks."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipestill.errors import InputError

STOPPED = "PIPESTILL_STOPPED"  # names a file that a stage leaves when it stops with exit 75, for `pipestill repro`
DEADLINE = "PIPESTILL_DEADLINE"  # Unix seconds at which a stage is to stop
JOB_END = "PIPESTILL_JOB_END"  # Unix seconds at which a scheduler ends the job, whatever it is doing
MARGIN = 60.0  # seconds before that end
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
AGAIN = 2.0  # seconds after which another Ctrl-C is a second one; a launcher passes on the first at once


class StopRequest:
    """SIGTERM, SIGINT, SIGUSR2, a deadline and a job's end, folded into one question that a loop asks at its steps.

    `margin` is how many seconds before its job's end the work stops at the latest.
    """

    def __init__(self, margin: float = MARGIN) -> None:
        self.reason: str | None = None
        self.margin = margin
        self._first: float | None = None  # when the first signal came
        self._deadline, self._job_end = _moment(DEADLINE), _moment(JOB_END)

    def requested(self) -> bool:
        now = time.time()
        if self.reason is None and self._deadline is not None and now >= self._deadline:
            self.reason = "its time limit"
        if self.reason is None and self._job_end is not None and now >= self._job_end - self.margin:
            self.reason = "the end of its job"
        return self.reason is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._first is not None and now - self._first > AGAIN:
            raise KeyboardInterrupt  # whoever presses twice does not want to wait
        self._first = self._first or now
        self.reason = signal.Signals(number).name

    @contextmanager
    def listening(self, *, hand_back: bool = True) -> Iterator[None]:
        """Turns the stop signals into requests (in the main thread; elsewhere signals are not ours to take).

        Ctrl-C is handed back at the end, for a caller of the Python functions. The others stay: a launcher or scheduler
        that repeats its SIGTERM must not end a process that is about to leave its outcome.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            if hand_back:
                signal.signal(signal.SIGINT, before[signal.SIGINT] or signal.default_int_handler)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Puts back, at the end, who hears the stop signals."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _moment(variable: str) -> float | None:
    """The Unix seconds that a variable holds. Raises InputError."""
    text = os.environ.get(variable)
    try:
        return float(text) if text else None
    except ValueError:
        raise InputError(f"{variable}={text} is no time: give Unix seconds, or use --deadline-min") from None
