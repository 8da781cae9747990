"""Where the time of an update goes: seconds by phase, measured only where somebody asks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

PHASES = ("data", "forward", "backward", "optimizer", "ema")


class Clock:
    """Seconds spent in each phase since the last `taken`; it waits for a GPU at either end of a phase."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begun = self._now()
        yield
        self._seconds[name] += self._now() - begun

    def taken(self) -> dict[str, float]:
        """What was measured, by phase; counting begins anew."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def phase(clock: Clock | None, name: str) -> AbstractContextManager[None]:
    """A phase on a clock; nothing where there is none."""
    return nullcontext() if clock is None else clock.phase(name)
