"""Finished blocks on their way to disk: copied from the device, checked and written while the next one computes.

One file a block, whole or not there at all; a block whose file exists is never computed again. It may touch the
folder of blocks alone.
"""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from pipestill.errors import SurroundingsError
from pipestill.sampling.items import to_uint8
from pipestill.sampling.plan import Block
from pipestill.work import write_atomic

Product = Callable[[Tensor], Tensor]  # what is kept of x0 [n, C, H, W], both on the device: [n, ...]
WAITING = 2  # finished blocks that may wait to be written before the next one is held back


def pictures(x0: Tensor) -> Tensor:
    """The product that is looked at: uint8 [n, H, W, C]."""
    return to_uint8(x0).permute(0, 2, 3, 1).contiguous()


def block_file(folder: Path, block: Block) -> Path:
    return folder / f"{block.name}.npy"


@dataclass(frozen=True)
class _Job:
    block: Block
    rows: Tensor  # the product [count, ...] on the host, valid once `ready` has passed
    finite: Tensor  # bool [count] on the host, likewise
    ready: Any  # CUDA event, or None
    held: tuple[Tensor, ...]  # what a copy under way reads from


class BlockWriter:
    """Writes blocks from a thread of its own; its failure is raised by the next `put` or at the end.

    Leaving the context waits for everything that was put to be written.
    """

    def __init__(self, folder: Path, product: Product = pictures) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._product = folder, product
        self._queue: queue.Queue[_Job | None] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self._failed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="block-writer", daemon=True)

    def put(self, block: Block, x0: Tensor) -> None:
        """Takes x0 [>= count, C, H, W] of a block; the padding behind its `count` items is dropped.

        Raises SurroundingsError where an earlier block could not be written or was not finite.
        """
        x0 = x0[: block.count]
        finite = torch.isfinite(x0).flatten(1).all(dim=1)
        rows = self._product(x0)
        ready, held = None, (rows, finite)
        if rows.device.type == "cuda":
            rows, finite = _to_host(rows), _to_host(finite)
            ready = torch.cuda.Event()
            ready.record()
        self._hand_over(_Job(block, rows, finite, ready, held))
        self._check()

    def _check(self) -> None:
        """Raises what went wrong in the thread, if anything did."""
        if self._failed.is_set():
            assert self._error is not None
            raise self._error

    def _hand_over(self, job: _Job | None) -> None:
        while not self._failed.is_set():
            try:
                self._queue.put(job, timeout=0.1)
                return
            except queue.Full:
                continue

    def _work(self) -> None:
        try:
            while (job := self._queue.get()) is not None:
                self._write(job)
        except BaseException as error:
            self._error = error
            self._failed.set()

    def _write(self, job: _Job) -> None:
        if job.ready is not None:
            job.ready.synchronize()
        if not bool(job.finite.all()):
            item = job.block.first + int((~job.finite).nonzero()[0])
            raise SurroundingsError(
                f"item {item} of seed {job.block.seed} is not finite: sample with precision=fp32 or less guidance, "
                "or train the model anew"
            )
        buffer = io.BytesIO()
        np.save(buffer, job.rows.numpy())
        write_atomic(block_file(self._folder, job.block), buffer.getvalue())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hand_over(None)
        self._thread.join()
        if kind is None:
            self._check()


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, under way when this returns."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
