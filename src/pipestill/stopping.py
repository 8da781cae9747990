"""Being asked to stop: signals and a deadline, remembered until a loop is at a step boundary and asks."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType


class StopRequest:
    """SIGTERM, SIGINT, SIGUSR2 and a deadline, folded into one question that a loop asks at its step boundary."""

    def __init__(self) -> None:
        self.reason: str | None = None
        deadline = os.environ.get("PIPESTILL_DEADLINE")  # Unix seconds, set by the launcher
        self._deadline = float(deadline) if deadline else None

    def requested(self) -> bool:
        if self.reason is None and self._deadline is not None and time.time() >= self._deadline:
            self.reason = "its time limit"
        return self.reason is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def listen(self) -> None:
        """Turns the stop signals into requests (in the main thread; elsewhere signals are not ours to take)."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._on_signal)
