"""Batches for training: a pure function of the step, so that any run resumes exactly, on any number of ranks.

Reads a dataset artefact; the decoded set can stay on the device, in host memory, or in the store.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
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
Gathered = tuple[Tensor, Tensor, Tensor]
CHUNK_BYTES = 256 << 20  # read at a time while the cache is filled


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step.

    Images float32 [b, C, H, W] in [-1, 1], labels and stream positions int64 [b], all on the device.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor


class Loader:
    """Step k takes the positions [k * batch, (k + 1) * batch) of the stream, rank r the r-th contiguous share.

    `cache` decides speed alone: `device` keeps the part's uint8 images on the device and gathers there, `host` keeps
    them in memory, `none` reads the store for every batch. `balanced` gives every class its turn equally often.
    Raises InputError where the part is empty or ranks cannot share a batch.
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
        balanced: bool = False,
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
        self._classes = order.members(dataset.labels[self._indices]) if balanced else []
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: dict[int, Future[Gathered]] = {}
        self._images: Tensor | None = None
        if cache != "none":
            self._images = _decoded(dataset, self._indices, device if cache == "device" else torch.device("cpu"))
        if cache == "device":
            self._labels = self._labels.to(device)

    def __len__(self) -> int:
        """Number of images in the part."""
        return len(self._indices)

    def batch(self, step: int) -> Batch:
        """This rank's share of step `step`; what the store is read for is the next step's, while this one computes."""
        if self._cache != "none":
            return self._arrive(self._gather(step))
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        coming = self._ahead.pop(step, None) or self._reader.submit(self._gather, step)
        self._ahead = {step + 1: self._reader.submit(self._gather, step + 1)}
        return self._arrive(coming.result())

    def _gather(self, step: int) -> Gathered:
        """Images uint8 [b, C, H, W], labels and positions, wherever the cache is."""
        stream = order.positions(step, batch=self._batch, rank=self._rank, size=self._size)
        if self._classes:
            chosen = order.balanced_at(stream, classes=self._classes, seed=self._seed)
        else:
            chosen = order.images_at(stream, count=len(self._indices), seed=self._seed)
        index = torch.from_numpy(chosen)
        if self._images is None:
            images = torch.from_numpy(self._dataset.images(self._indices[chosen])).permute(0, 3, 1, 2)
        else:
            images = self._images.index_select(0, index.to(self._images.device))
        labels = self._labels.index_select(0, index.to(self._labels.device))
        positions = torch.from_numpy(stream)
        if self._pin:  # from pageable memory a copy to the device would wait for it
            positions = positions.pin_memory()
            if self._cache != "device":
                images, labels = images.contiguous().pin_memory(), labels.pin_memory()
        return images, labels, positions

    def _arrive(self, gathered: Gathered) -> Batch:
        """Moves bytes to the device and makes floats there."""
        images, labels, positions = (tensor.to(self._device, non_blocking=True) for tensor in gathered)
        return Batch(to_floats(images), labels, positions)


def to_floats(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] to float32 in [-1, 1], contiguous."""
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


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
