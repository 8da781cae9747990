"""Feature tables on disk: extracted in fixed blocks that ranks share, and gone on with after a kill.

A table is a plain .npy file of float32 [n, dimension] in a folder that every rank sees; it may touch that folder alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipestill.errors import Stopped
from pipestill.evaluation.extractors import Extractor
from pipestill.progress import Bar
from pipestill.work import write_atomic

if TYPE_CHECKING:
    from pipestill.distributed import World


def table_path(folder: Path, label: str, extractor: str) -> Path:
    """Where the table of one set of images by one extractor lies."""
    return folder / f"{label}-{extractor}.npy"


def read_table(path: Path) -> Tensor:
    """A table, mapped into memory: rows are read from disk when they are used."""
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def extract(
    folder: Path,
    label: str,
    extractors: Sequence[Extractor],
    images: Callable[[int, int], Tensor],
    count: int,
    *,
    block: int,
    world: World,
) -> dict[str, Tensor]:
    """Tables of `count` images by each extractor, by name, on every rank.

    `images(first, last)` gives uint8 [last - first, C, H, W]. Rank r takes blocks r, r + size, …; blocks that an
    earlier attempt finished are not done again. Raises Stopped, with what is done kept, at the deadline or on request.
    """
    tables = [table_path(folder, label, extractor.name) for extractor in extractors]
    sizes = [min(block, count - first) for first in range(0, count, block)]
    done: set[int] = set()
    if world.leader:
        done = _finished(folder, label, tables)
        if not done:
            _create(tables, extractors, count)
    done = world.broadcast(done)
    world.barrier()
    known = sum(sizes[index] for index in done)
    bar = Bar(f"features of {label}", count, done=known, unit="images", show=world.leader)

    def ask() -> None:
        if world.agree(world.stop.requested())[0]:
            raise Stopped(f"stopped by {world.stop.reason or 'another rank'} with its state saved: start it again")

    with world.stop.at_steps(), closing(bar):
        for start in range(0, len(sizes), world.size):
            ask()
            index = start + world.rank
            if index < len(sizes) and index not in done:
                first = index * block
                pixels = images(first, first + sizes[index])
                for table, extractor in zip(tables, extractors, strict=True):
                    _write_rows(table, extractor(pixels).cpu().numpy(), first)
                _mark(folder, label, world.rank, index)
            bar.advance(sum(sizes[i] for i in range(start, min(start + world.size, len(sizes))) if i not in done))
        ask()
    world.barrier()
    return {extractor.name: read_table(table) for table, extractor in zip(tables, extractors, strict=True)}


def _create(tables: Sequence[Path], extractors: Sequence[Extractor], count: int) -> None:
    for table, extractor in zip(tables, extractors, strict=True):
        empty = np.lib.format.open_memmap(table, mode="w+", dtype=np.float32, shape=(count, extractor.dimension))
        empty.flush()


def _write_rows(table: Path, rows: np.ndarray[tuple[int, ...], np.dtype[np.float32]], first: int) -> None:
    with table.open("r+b") as file:
        version = np.lib.format.read_magic(file)
        assert version == (1, 0)
        np.lib.format.read_array_header_1_0(file)
        file.seek(first * rows.shape[1] * rows.itemsize, os.SEEK_CUR)
        file.write(np.ascontiguousarray(rows).tobytes())
        file.flush()
        os.fsync(file.fileno())


def _mark(folder: Path, label: str, rank: int, index: int) -> None:
    with (folder / f"{label}.done-{rank}").open("a", encoding="utf-8") as file:
        file.write(f"{index}\n")


def _finished(folder: Path, label: str, tables: Sequence[Path]) -> set[int]:
    """The blocks that earlier attempts finished; their marks are gathered in one file, for new ones to be added to.

    A line cut off by a power cut does not count, and must not join the next mark to another number.
    """
    logs = sorted(folder.glob(f"{label}.done-*"))
    lines = [line for log in logs for line in log.read_text(encoding="utf-8").splitlines(keepends=True)]
    whole = all(table.exists() for table in tables)
    done = {int(line) for line in lines if line.endswith("\n")} if whole else set[int]()
    write_atomic(folder / f"{label}.done-0", "".join(f"{index}\n" for index in sorted(done)))
    for log in logs:
        if log.name != f"{label}.done-0":
            log.unlink()
    return done
