"""Batches for training: a pure function of the step, so that any run resumes exactly, on any number of ranks.

Reads a dataset artefact; the decoded set can stay on the device, in host memory, or in the store.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipestill.data import order
from pipestill.data.store import Dataset
from pipestill.errors import InputError

Cache = Literal["device", "host", "none"]
AHEAD = 2  # batches that wait, loaded, while one is in use
CHUNK_BYTES = 256 << 20  # read at a time while the cache is filled


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step.

    Images float32 [b, C, H, W] in [-1, 1] and labels int64 [b] on the device, stream positions int64 [b] on the CPU.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor


class Loader:
    """Step k takes the positions [k * batch, (k + 1) * batch) of the stream, rank r the r-th contiguous share.

    `cache` decides speed alone: `device` keeps the part's uint8 images on the device and gathers there, `host` keeps
    them in memory, `none` reads the store for every batch. Raises InputError where the part is empty or ranks cannot
    share a batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        part: str,
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        size: int = 1,
        cache: Cache,
        device: torch.device,
    ) -> None:
        order.check_share(batch, size)
        self._indices = dataset.split[part]
        if not len(self._indices):
            raise InputError(f"{dataset.artifact.path} has no image in its {part} part: see data.split")
        self._dataset, self._batch, self._seed = dataset, batch, seed
        self._rank, self._size = rank, size
        self._cache, self._device = cache, device
        self._pin = device.type == "cuda"
        self._labels = torch.from_numpy(dataset.labels[self._indices])
        self._images: Tensor | None = None
        if cache != "none":
            self._images = _decoded(dataset, self._indices, device if cache == "device" else torch.device("cpu"))
        if cache == "device":
            self._labels = self._labels.to(device)

    def __len__(self) -> int:
        """Number of images in the part."""
        return len(self._indices)

    def batch(self, step: int) -> Batch:
        """This rank's share of step `step`."""
        return self._arrive(self._gather(step))

    def prefetch(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps `start` to `stop`, the next ones gathered by a thread while one is in use."""
        if self._cache == "device":
            yield from (self.batch(step) for step in range(start, stop))
            return
        waiting: queue.Queue[tuple[Tensor, Tensor, Tensor] | BaseException] = queue.Queue(AHEAD)
        left = threading.Event()

        def work() -> None:
            try:
                for step in range(start, stop):
                    waiting.put(self._gather(step))
                    if left.is_set():
                        return
            except BaseException as error:
                waiting.put(error)

        thread = threading.Thread(target=work, name="prefetch", daemon=True)
        thread.start()
        try:
            for _ in range(start, stop):
                gathered = waiting.get()
                if isinstance(gathered, BaseException):
                    raise gathered
                yield self._arrive(gathered)
        finally:
            left.set()
            while thread.is_alive():  # a full queue would hold the thread in its put
                try:
                    waiting.get_nowait()
                except queue.Empty:
                    thread.join(0.01)

    def _gather(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images uint8 [b, C, H, W], labels and positions, wherever the cache is."""
        stream = order.positions(step, batch=self._batch, rank=self._rank, size=self._size)
        chosen = order.images_at(stream, count=len(self._indices), seed=self._seed)
        index = torch.from_numpy(chosen)
        if self._images is None:
            images = torch.from_numpy(self._dataset.images(self._indices[chosen])).permute(0, 3, 1, 2)
        else:
            images = self._images.index_select(0, index.to(self._images.device))
        labels = self._labels.index_select(0, index.to(self._labels.device))
        if self._pin and self._cache != "device":
            images, labels = images.contiguous().pin_memory(), labels.pin_memory()
        return images, labels, torch.from_numpy(stream)

    def _arrive(self, gathered: tuple[Tensor, Tensor, Tensor]) -> Batch:
        """Moves bytes to the device and makes floats there."""
        images, labels, positions = gathered
        images = images.to(self._device, non_blocking=True)
        floats = images.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)
        return Batch(floats, labels.to(self._device, non_blocking=True), positions)


def _decoded(dataset: Dataset, indices: NDArray[np.int64], device: torch.device) -> Tensor:
    """The whole part as uint8 [n, C, H, W] on a device, read in chunks. Raises InputError where it does not fit."""
    shape = (len(indices), dataset.channels, dataset.resolution, dataset.resolution)
    try:
        out = torch.empty(shape, dtype=torch.uint8, device=device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        gigabytes = len(indices) * dataset.layout.image_bytes / 1e9
        raise InputError(f"{gigabytes:.1f} GB of images do not fit on {device}: set operation.cache=none") from error
    chunk = max(1, CHUNK_BYTES // dataset.layout.image_bytes)
    for start in range(0, len(indices), chunk):
        block = dataset.images(indices[start : start + chunk])
        out[start : start + len(block)] = torch.from_numpy(block).permute(0, 3, 1, 2)
    return out
