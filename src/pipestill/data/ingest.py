"""Decoding a source's images in parallel, each into its own slot of a file, journalled so that a kill costs seconds.

Workers write pixels and facts straight to the files; only the reasons of bad images travel back. It may touch the
folder that it is given.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipestill import digests
from pipestill.data.source import Content, Source
from pipestill.data.transforms import BadImage, Form, Found, difference_hash, prepare
from pipestill.errors import Stopped, SurroundingsError
from pipestill.progress import Bar
from pipestill.stopping import StopRequest
from pipestill.userfiles import escaped, unreadable

CHUNK = 64  # images that one task decodes and one line of the journal stands for
FLUSH_EVERY = 1.0  # seconds of work that a kill or a power cut may cost
LOOK = 0.2  # seconds after which a wait for other processes looks for a stop request
FACTS = np.dtype(
    [
        ("good", "?"),
        ("orientation", "u1"),
        ("transparent", "?"),
        ("mode", "S10"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("hash", "<u8"),
        ("digest", "u1", (32,)),
    ]
)


@dataclass(frozen=True)
class Ingested:
    """Every image of a source, in its order: pixels [N, H, W, C], facts [N], and the bad ones' reasons by index."""

    pixels: NDArray[np.uint8]
    facts: NDArray[Any]
    bad: dict[int, str]


def ingest(source: Source, form: Form, folder: Path, *, workers: int = 1, stop: StopRequest | None = None) -> Ingested:
    """Decodes every image into `folder`, going on from what lies there.

    Raises Stopped when asked to stop, and SurroundingsError where the disk is full or a worker was ended.
    """
    count = len(source.names)
    job = _Job(source, form, folder)
    chunks = -(-count // CHUNK)
    try:
        with closing(_Journal(job)) as journal:
            todo = [chunk for chunk in range(chunks) if chunk not in journal.done]
            bar = Bar("images", count, done=min(count, (chunks - len(todo)) * CHUNK), unit="image")
            stop = stop or StopRequest()
            with closing(_decoded(job, todo, workers, stop)) as results:
                for chunk, bad in results:
                    with stop.at_steps():
                        journal.add(chunk, bad)
                        bar.advance(len(job.range(chunk)))
                        _check(stop)
            bar.close()
    except OSError as error:
        raise SurroundingsError(
            f"{folder} could not be written ({error.strerror or error}): finished images are kept; fix it and start "
            "again"
        ) from error
    except BrokenProcessPool as error:
        raise SurroundingsError("a decoding process was ended (out of memory?): start it again to go on") from error
    pixels = np.memmap(job.pixels, dtype=np.uint8, mode="r", shape=(count, *form.shape))
    return Ingested(pixels, np.fromfile(job.facts, dtype=FACTS), journal.bad)


@dataclass(frozen=True)
class _Job:
    """What workers need; they inherit it through the fork."""

    source: Source
    form: Form
    folder: Path

    @property
    def pixels(self) -> Path:
        return self.folder / "pixels.u8"

    @property
    def facts(self) -> Path:
        return self.folder / "facts.bin"

    @property
    def image_bytes(self) -> int:
        return self.form.resolution**2 * self.form.channels

    def range(self, chunk: int) -> range:
        return range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.source.names)))

    def decode(self, chunk: int) -> tuple[int, dict[int, str]]:
        """Fills a chunk's slots; returns the reasons of its bad images."""
        items = self.range(chunk)
        facts, bad = np.zeros(len(items), dtype=FACTS), {}
        with self.pixels.open("rb+", buffering=0) as file:
            for fact, index in zip(facts, items, strict=True):
                found = Found()
                try:
                    pixels = prepare(self._content(index), self.form, found)
                except BadImage as error:
                    bad[index] = str(error)
                except MemoryError as error:
                    raise SurroundingsError(
                        f"{escaped(self.source.names[index])} ({found.width}x{found.height}) does not fit into memory: "
                        "lower operation.workers, or remove it"
                    ) from error
                else:
                    data = np.ascontiguousarray(pixels).data.cast("B")
                    _write_at(file.fileno(), data, index * self.image_bytes)
                    fact["good"] = True
                    fact["hash"] = difference_hash(pixels)
                    fact["digest"] = np.frombuffer(bytes.fromhex(digests.of_bytes(data)), dtype=np.uint8)
                fact["mode"], fact["orientation"] = found.mode, found.orientation
                fact["transparent"] = found.transparent
                fact["width"], fact["height"] = found.width, found.height
        with self.facts.open("rb+", buffering=0) as file:
            _write_at(file.fileno(), facts.view(np.uint8).data, items.start * FACTS.itemsize)
        return chunk, bad

    def _content(self, index: int) -> Content:
        """An image's content. Raises BadImage, and SurroundingsError if the machine failed to read it."""
        try:
            return self.source.read(index)
        except OSError as error:
            raise unreadable(self.source.names[index], error) from error


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


class _Journal:
    """Which chunks are in their slots, durably: slots are synced before the lines that vouch for them."""

    def __init__(self, job: _Job) -> None:
        count = len(job.source.names)
        self._slots = [_sized(job.pixels, count * job.image_bytes), _sized(job.facts, count * FACTS.itemsize)]
        self.done: set[int] = set()
        self.bad: dict[int, str] = {}
        path = job.folder / "journal.jsonl"
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            try:
                self._count_in(json.loads(line))
            except ValueError:
                break  # torn by a kill
            whole += len(line)
        self._file = path.open("ab")
        self._file.truncate(whole)
        self._lines: list[dict[str, Any]] = []
        self._flushed = time.monotonic()

    def _count_in(self, line: dict[str, Any]) -> None:
        self.done.add(line["chunk"])
        self.bad |= {int(index): reason for index, reason in line["bad"].items()}

    def add(self, chunk: int, bad: dict[int, str]) -> None:
        self._lines.append({"chunk": chunk, "bad": bad})
        self._count_in(self._lines[-1])
        if time.monotonic() - self._flushed >= FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        for slots in self._slots:
            os.fsync(slots)
        self._file.write("".join(json.dumps(line) + "\n" for line in self._lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._lines, self._flushed = [], time.monotonic()

    def close(self) -> None:
        try:
            if self._lines:
                self.flush()
        finally:
            self._file.close()
            for slots in self._slots:
                os.close(slots)


def _sized(path: Path, size: int) -> int:
    """The file opened for writing, `size` bytes long; a disk without room for it says so now, not hours later."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check(stop: StopRequest) -> None:
    if stop.requested():
        raise Stopped(f"stopped by {stop.reason} with its state saved: start it again to go on")


def _decoded(job: _Job, todo: list[int], workers: int, stop: StopRequest) -> Generator[tuple[int, dict[int, str]]]:
    """Runs the chunks, in processes where that pays; yields each as it is done. Raises Stopped when asked to stop.

    A read may hang for ever. A signal interrupts it in this process; a pool of processes is left at the next look,
    since an exception raised within the pool's own code would leave its locks held.
    """
    workers = min(workers, len(todo))
    if workers <= 1:
        yield from map(job.decode, todo)
        return
    with stop.at_steps():
        yield from _in_processes(job, todo, workers, stop)


def _in_processes(job: _Job, todo: list[int], workers: int, stop: StopRequest) -> Generator[tuple[int, dict[int, str]]]:
    context = multiprocessing.get_context("fork")  # the source is inherited, not copied; workers use no torch
    pool = ProcessPoolExecutor(workers, context, _start_worker, (job, os.getpid()))
    done = False
    try:
        left = iter(todo)
        running = {pool.submit(_decode, chunk) for chunk in islice(left, 4 * workers)}
        while running:
            finished, running = wait(running, timeout=LOOK, return_when=FIRST_COMPLETED)
            running |= {pool.submit(_decode, chunk) for chunk in islice(left, len(finished))}
            for future in finished:
                yield future.result()
            _check(stop)
        done = True
    finally:
        for worker in list((pool._processes or {}).values()) if not done else ():
            worker.kill()  # it may hang in a read; what it has not reported is decoded again
        pool.shutdown(wait=True, cancel_futures=True)


_worker: _Job


def _start_worker(job: _Job, parent: int) -> None:
    """A worker leaves stop signals to its parent and ends when the parent ends, even by SIGKILL."""
    global _worker
    _worker = job
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _decode(chunk: int) -> tuple[int, dict[int, str]]:
    return _worker.decode(chunk)
