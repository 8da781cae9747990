"""Trackers: one small interface for a training's figures; the log under the run's folder is always kept."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Tracker(Protocol):
    """Takes figures and pictures as a training goes on."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """`image` is uint8 [H, W, C]."""
        ...

    def close(self) -> None: ...


class Silent:
    """Tracks nothing: for ranks other than the leader."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        pass

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        pass

    def close(self) -> None:
        pass


class JsonLines:
    """`log.jsonl`: one line an entry, with the time."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "log.jsonl").open("a")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3)} | dict(figures)) + "\n")
        self._file.flush()

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        pass

    def close(self) -> None:
        self._file.close()


def open_trackers(names: Sequence[str], folder: Path, run_name: str, parameters: Mapping[str, Any]) -> Tracker:
    """The log and the named trackers as one."""
    return JsonLines(folder)
