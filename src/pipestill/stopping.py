"""Being asked to stop: by a signal, a deadline, or the end of a job.

Loops that save state at their steps defer stop signals and ask at each step. Everywhere else a signal raises
Interrupted at once, whatever the process is waiting for: nothing that a stage leaves is worse off than after kill -9.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from pipestill.entry import STOP_SIGNALS as STOP_SIGNALS
from pipestill.errors import InputError, Stopped

STOPPED = "PIPESTILL_STOPPED"  # names a file that a stage leaves when it stops with exit 75, for `pipestill repro`
DEADLINE = "PIPESTILL_DEADLINE"  # Unix seconds at which a stage is to stop
JOB_END = "PIPESTILL_JOB_END"  # Unix seconds at which a scheduler ends the job, whatever it is doing
MARGIN = 60.0  # seconds before that end
AGAIN = 2.0  # seconds after which another Ctrl-C is a second one; a launcher passes on the first at once


class Interrupted(KeyboardInterrupt):
    """A stop signal that came where no loop asks for one. No code that handles errors may take it for one."""


class StopRequest:
    """SIGTERM, SIGINT, SIGUSR2, a deadline and a job's end, folded into one question that a loop asks at its steps.

    `margin` is how many seconds before its job's end the work stops at the latest.
    """

    def __init__(self, margin: float = MARGIN) -> None:
        self.reason: str | None = None
        self.margin = margin
        self._first: float | None = None  # when the first signal came
        self._deferred = 0  # loops that ask, or more than 0 where nothing is left to stop
        self._held = False  # whether a signal came meanwhile
        self._leave: Callable[[str], None] | None = None
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
        if self._deferred:
            self._held = True
            return
        if self._leave is not None and _importing(frame):
            self._leave(self.reason)  # an exception would be lost in a module's own handling of a failed import
        raise Interrupted(self.reason)

    @contextmanager
    def at_steps(self) -> Iterator[None]:
        """Within, signals are only remembered: a loop asks `requested` at each of its steps.

        Raises Interrupted at the end if a signal came after the loop asked for the last time.
        """
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if self._held and not self._deferred:
            raise Interrupted(self.reason)

    def check(self, state: str = "start it again") -> None:
        """Raises Stopped if a stop was requested; `state` says what is kept and what to do."""
        if self.requested():
            raise Stopped(f"stopped by {self.reason}: {state}")

    @contextmanager
    def listening(self, *, hand_back: bool = True, leave: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hears the stop signals (in the main thread; elsewhere signals are not ours to take). Raises Stopped.

        `leave`, which commands give, ends the process if a signal comes during an import; without it, that raises
        Interrupted too. A caller of the Python functions has all its handlers back at the end. In a command, Ctrl-C is
        handed back unless `hand_back` is False. The others stay, and do nothing: a launcher or scheduler that repeats
        its SIGTERM must not end a process that is about to leave its outcome.
        """
        command = leave is not None or isinstance(_listener(), StopRequest)
        self._leave = leave or _leave_of(_listener())
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        try:
            yield
        except Interrupted:
            raise Stopped(f"stopped by {self.reason or 'a signal'}: start it again") from None
        finally:
            self._deferred, self._leave = 1, None
            for number in STOP_SIGNALS:
                if not command or (hand_back and number == signal.SIGINT):
                    signal.signal(number, before[number] or signal.SIG_DFL)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Puts back, at the end, who hears the stop signals."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listener() -> object:
    """Whose method hears SIGTERM now."""
    return getattr(signal.getsignal(signal.SIGTERM), "__self__", None)


def _leave_of(request: object) -> Callable[[str], None] | None:
    """What the request that listens now does if a signal comes during an import."""
    return request._leave if isinstance(request, StopRequest) else None


def _importing(frame: FrameType | None) -> bool:
    """Whether the interrupted code runs within an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _moment(variable: str) -> float | None:
    """The Unix seconds that a variable holds. Raises InputError."""
    text = os.environ.get(variable)
    try:
        return float(text) if text else None
    except ValueError:
        raise InputError(f"{variable}={text} is no time: give Unix seconds, or use --deadline-min") from None
