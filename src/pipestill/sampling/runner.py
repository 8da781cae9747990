"""Sampling blocks over ranks: each rank takes the next block when it is free, so a slow one does not hold the rest.

Blocks that lie in the folder already are done. It may touch the folder of blocks alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipestill.distributed import World
from pipestill.errors import Stopped, SurroundingsError
from pipestill.progress import Bar, say
from pipestill.sampling.plan import Block
from pipestill.sampling.writer import BlockWriter, Product, block_file, pictures

Compute = Callable[[Block, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Progress:
    """What one call of `run_blocks` did over all ranks: images sampled now, and seconds from first to last block."""

    images: int
    seconds: float


def run_blocks(
    compute: Compute,
    blocks: Sequence[Block],
    labels: NDArray[np.int64],
    *,
    micro_batch: int,
    folder: Path,
    world: World,
    name: str,
    product: Product = pictures,
) -> Progress:
    """Samples every block that is not yet in `folder`; returns on every rank once all of them are there.

    `compute(block, items, labels)` gives x0 [micro_batch, C, H, W] for items [micro_batch] int64 with labels
    [micro_batch] int64, both on the host: a short block is padded with the items that would follow, under its last
    label. `labels[i]` is item i's, the same for each seed. A block's file holds the `product` of its images. `name` is
    unique to this piece of work. Raises Stopped (finished blocks are kept) on a request to any rank, SurroundingsError
    for a full disk or a sample that is not finite.
    """
    done = world.broadcast(_finished(folder))
    pending = [block for block in blocks if block.name not in done]
    total, left = (sum(block.count for block in part) for part in (blocks, pending))
    if world.leader and done and pending:
        say(f"{total - left} of {total} images are there already: going on")
    bar = Bar("sample", total, done=total - left, unit="images", show=world.leader)
    world.barrier()  # so that the seconds hold no rank's start-up
    started = time.monotonic()
    taken = 0
    with world.stop.at_steps(), closing(bar):
        with BlockWriter(folder, product) as writer:
            for index in _share(world, name, len(pending)):
                block = pending[index]
                handed_out = sum(earlier.count for earlier in pending[taken:index])  # by other ranks, meanwhile
                items = torch.arange(block.first, block.first + micro_batch)
                rows = np.minimum(items.numpy(), block.first + block.count - 1)
                writer.put(block, compute(block, items, torch.from_numpy(labels[rows])))
                bar.advance(handed_out + block.count)
                taken = index + 1
        world.barrier()
        seconds = time.monotonic() - started
        done = world.broadcast(_finished(folder))
        bar.advance(sum(block.count for block in pending[taken:] if block.name in done))
        missing = sum(block.count for block in blocks if block.name not in done)
        if missing and any(world.gather(world.stop.requested())):
            raise Stopped(
                f"stopped by {world.stop.reason or 'another rank'} with {total - missing} of {total} images, all kept: "
                "start it again to go on"
            )
    if missing:
        raise SurroundingsError(f"{missing} images are not in {folder}: is it on a file system that all ranks share?")
    return Progress(left, seconds)


def _finished(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.npy")}


def _share(world: World, name: str, count: int) -> Iterator[int]:
    """This rank's share of 0..count-1, one number whenever it is free; a stop request hands the rest to nobody."""
    counter = world.counter(name)
    while (index := counter.next()) < count:
        if world.stop.requested():
            while counter.next() < count:
                pass
            return
        yield index


def read_blocks(folder: Path, blocks: Sequence[Block], shape: tuple[int, ...]) -> Iterator[NDArray[Any]]:
    """What finished blocks hold, [count, *shape], in item order. Raises SurroundingsError for a bad file."""
    for block in blocks:
        path = block_file(folder, block)
        try:
            rows = np.load(path)
        except (OSError, ValueError) as error:
            raise SurroundingsError(f"{path} cannot be read ({error}): remove it and start again") from error
        if rows.shape != (block.count, *shape):
            raise SurroundingsError(f"{path} holds rows of another shape: remove it and start again")
        yield rows
