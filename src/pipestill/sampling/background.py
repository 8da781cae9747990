"""Pictures on their way to disk: encoded and written by a thread, so that a training never waits for a file system.

What cannot be written is named and forgotten. It may touch the folders that it is given alone.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipestill.errors import SurroundingsError
from pipestill.progress import warn
from pipestill.sampling.pictures import save_png

WAITING = 4  # sets of pictures that may wait to be written
Pictures = Mapping[Path, NDArray[np.uint8]]  # uint8 [H, W, 1 or 3] by file


class PictureWriter:
    """Takes sets of pictures and never blocks; `patience` is how many seconds one file may take.

    While a file takes longer, its file system counts as hung: it is named, and what comes meanwhile is left out.
    """

    def __init__(self, patience: float = 30.0, *, sweep: Path | None = None) -> None:
        """The thread first removes what a killed process left half-written below `sweep`."""
        self._patience = patience
        self._sweep = sweep
        self._queue: queue.SimpleQueue[tuple[str, Pictures] | None] = queue.SimpleQueue()
        self._writing: tuple[Path, float] | None = None  # the file and when it was begun
        self._named: Path | None = None  # the file that was named as hung
        self.seconds = 0.0  # of processor time that encoding and writing have taken
        self._thread = threading.Thread(target=self._work, name="picture-writer", daemon=True)
        self._thread.start()

    def put(self, what: str, pictures: Pictures) -> bool:
        """Hands over pictures, which `what` calls by name in messages; False where they are left out."""
        if self._hung():
            warn(f"{what}: not written: the file system still hangs")
            return False
        if self._queue.qsize() >= WAITING:
            warn(f"{what}: not written: the file system is too slow, {WAITING} others wait")
            return False
        self._queue.put((what, pictures))
        return True

    def close(self, seconds: float) -> None:
        """Waits so long for what was put; a thread that takes longer, or hangs, is left behind."""
        self._queue.put(None)
        limit = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < limit and not self._hung():
            self._thread.join(0.05)

    def _hung(self) -> bool:
        writing = self._writing
        if writing is None or time.monotonic() - writing[1] < self._patience:
            return False
        if writing[0] != self._named:
            self._named = writing[0]
            warn(
                f"{writing[0]} has been written for more than {self._patience:g} s: does its file system hang? "
                "The training goes on without pictures until it answers"
            )
        return True

    def _swept(self, folder: Path) -> None:
        self._writing = (folder, time.monotonic())
        with suppress(OSError):
            for partial in folder.rglob(".*.partial"):
                if partial.is_file():
                    partial.unlink()
        self._writing = None

    def _work(self) -> None:
        if self._sweep is not None:
            self._swept(self._sweep)
        while (job := self._queue.get()) is not None:
            what, pictures = job
            failed: list[str] = []
            for path, picture in pictures.items():
                self._writing = (path, time.monotonic())
                try:
                    save_png(picture, path)
                except (SurroundingsError, OSError) as error:
                    failed.append(str(error))
                finally:
                    self._writing = None
                    self.seconds = time.thread_time()
            if failed:
                others = f"; nor could {len(failed) - 1} others" if len(failed) > 1 else ""
                warn(f"{what}: {failed[0]}{others}; the training goes on")
