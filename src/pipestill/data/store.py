"""The dataset artefact: raw uint8 images in one LMDB file, many to a value, with labels, parts and digests beside it.

Equal images give equal bytes. This module reads and writes the artefact's files, and DMD2's LMDB layout.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipestill import artifacts, mixes, outputs
from pipestill.artifacts import Artifact
from pipestill.errors import InputError, SurroundingsError
from pipestill.progress import Bar
from pipestill.userfiles import OF_THE_SURROUNDINGS, NotAFile, unreadable

IMAGES = "images.lmdb"
PARTS = ("train", "validation", "test")
PAGE = 4096
COMMIT_BYTES = 64 << 20  # a transaction's size; fixed, because commits decide how LMDB lays out its pages
LARGEST_VALUE = 1 << 31


class _Opened(NamedTuple):
    process: int
    environment: lmdb.Environment


_opened: dict[tuple[int, int], _Opened] = {}


def environment(path: Path) -> lmdb.Environment:
    """This process's one read-only environment of an LMDB file (or folder), opened when first asked for.

    LMDB allows no second one of the same file in a process, and none may cross a fork. Raises InputError for a file
    that is no LMDB or is truncated (reading past its end would end the process).
    """
    file = path / "data.mdb" if path.is_dir() else path
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise NotAFile(file, status.st_mode)
    except OSError as error:
        if error.errno in OF_THE_SURROUNDINGS:
            raise unreadable(file, error) from error
        raise InputError(f"{file} cannot be read ({error.strerror}): an LMDB file was expected there") from error
    identity = (status.st_dev, status.st_ino)
    opened = _opened.get(identity)
    if opened is not None and opened.process == os.getpid():
        return opened.environment
    if opened is not None:
        opened.environment.close()  # inherited through a fork: dropped here, untouched in the parent
    try:
        env = lmdb.open(
            str(file), subdir=False, readonly=True, lock=False, readahead=False, max_readers=1024, create=False
        )
    except lmdb.Error as error:
        raise InputError(f"{file} is no LMDB that can be read ({_reason(error)}): rebuild or copy it again") from error
    needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    if status.st_size < needed:
        env.close()
        raise InputError(f"{file} is truncated ({status.st_size} bytes of {needed}): rebuild or copy it again")
    _opened[identity] = _Opened(os.getpid(), env)
    return env


def _reason(error: lmdb.Error | OSError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error).rsplit(": ", 1)[-1]


@dataclass(frozen=True)
class Layout:
    """How images lie in the LMDB: `count` of [resolution, resolution, channels] uint8, `per_value` to a value."""

    count: int
    resolution: int
    channels: int
    per_value: int

    @property
    def image_bytes(self) -> int:
        return self.resolution**2 * self.channels

    @property
    def values(self) -> int:
        return -(-self.count // self.per_value)


@dataclass(frozen=True)
class Dataset:
    """A dataset artefact, open for reading; may be pickled and may cross a fork.

    `labels` int64 [N] (-1 where there are none); `split` maps train, validation and test to sorted indices int64.
    """

    artifact: Artifact
    layout: Layout
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    parts: NDArray[np.uint8]  # [N], index into PARTS
    pixel_std: float  # standard deviation of the train part's pixels in [-1, 1]

    @property
    def resolution(self) -> int:
        return self.layout.resolution

    @property
    def channels(self) -> int:
        return self.layout.channels

    def __len__(self) -> int:
        return self.layout.count

    @cached_property
    def split(self) -> dict[str, NDArray[np.int64]]:
        return {name: np.flatnonzero(self.parts == code) for code, name in enumerate(PARTS)}

    @cached_property
    def digests(self) -> NDArray[np.uint8]:
        """SHA-256 of each image's stored bytes, uint8 [N, 32]."""
        digests: NDArray[np.uint8] = _load_array(self.artifact, "digests.npy")
        return digests

    @cached_property
    def names(self) -> list[str]:
        """Each image's name in its source."""
        return [json.loads(line) for line in self.artifact.file("names.jsonl").read_text(encoding="utf-8").splitlines()]

    @cached_property
    def train_counts(self) -> NDArray[np.int64]:
        """Images of each class in the train part, int64 [classes]."""
        return mixes.counts(self.labels[self.split["train"]], len(self.classes))

    @property
    def empty(self) -> tuple[str, ...]:
        """Names of the classes that have no image to train on."""
        return tuple(name for name, count in zip(self.classes, self.train_counts, strict=True) if not count)

    def images(self, indices: ArrayLike) -> NDArray[np.uint8]:
        """Images uint8 [n, H, W, C] at the given indices, in their order. Raises IndexError."""
        wanted = np.asarray(indices, dtype=np.int64)
        shape = (self.resolution, self.resolution, self.channels)
        out = np.empty((len(wanted), *shape), dtype=np.uint8)
        if not len(wanted):
            return out
        if wanted.min() < 0 or wanted.max() >= len(self):
            raise IndexError(f"image indices run from 0 to {len(self) - 1}")
        values, slots = np.divmod(wanted, self.layout.per_value)
        order = np.argsort(values, kind="stable")
        ends = [*np.flatnonzero(np.diff(values[order])) + 1, len(order)]
        path = self.artifact.path / IMAGES
        try:
            with environment(path).begin(buffers=True) as transaction:
                start = 0
                for end in ends:
                    group = order[start:end]
                    block = np.frombuffer(transaction.get(_key(int(values[group[0]])), b""), dtype=np.uint8)
                    out[group] = block.reshape(-1, *shape)[slots[group]]
                    start = end
        except lmdb.Error as error:
            raise InputError(f"{path} cannot be read ({_reason(error)}): rebuild {self.artifact.path}") from error
        return out


def open_dataset(path: Path) -> Dataset:
    """Opens a dataset artefact. Raises InputError in one line where it is none, not whole or of another schema."""
    artifact = artifacts.read(path, "dataset")
    try:
        index = json.loads(artifact.file("index.json").read_text(encoding="utf-8"))
        layout = Layout(index["count"], index["resolution"], index["channels"], index["images_per_value"])
        classes, pixel_std = tuple(index["classes"]), float(index["pixel_std"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path / 'index.json'} cannot be read ({error}): rebuild {path}") from error
    labels, parts = _load_array(artifact, "labels.npy"), _load_array(artifact, "parts.npy")
    if environment(artifact.file(IMAGES)).stat()["entries"] != layout.values or not (
        len(labels) == len(parts) == layout.count
    ):
        raise InputError(f"{path}: images, labels and parts do not belong together: rebuild it")
    return Dataset(artifact, layout, classes, labels, parts, pixel_std)


def _load_array(artifact: Artifact, name: str) -> Any:
    path = artifact.file(name)
    try:
        return np.load(path, allow_pickle=False)
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}): rebuild {artifact.path}") from error


def write_dataset(
    folder: Path,
    blocks: Iterable[NDArray[np.uint8]],
    layout: Layout,
    *,
    classes: Sequence[str],
    labels: NDArray[np.int64],
    parts: NDArray[np.uint8],
    names: Sequence[str],
    digests: NDArray[np.uint8],
) -> float:
    """Fills `folder`; `blocks` yields arrays of `layout.per_value` images each, the last one maybe fewer.

    Returns the standard deviation of the train part's pixels.
    """
    counts = np.zeros(256, dtype=np.int64)  # of each pixel value in the train part
    write_lmdb(
        folder / IMAGES,
        (
            (_key(number), np.ascontiguousarray(block).reshape(-1).data)
            for number, block in enumerate(_counted(blocks, parts, counts))
        ),
        values=layout.values,
        value_bytes=layout.per_value * layout.image_bytes,
    )
    index = {
        "count": layout.count,
        "resolution": layout.resolution,
        "channels": layout.channels,
        "images_per_value": layout.per_value,
        "classes": list(classes),
        "pixel_std": pixel_std(counts),
    }
    (folder / "index.json").write_text(
        json.dumps(index, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (folder / "names.jsonl").write_text("".join(json.dumps(name) + "\n" for name in names), encoding="utf-8")
    np.save(folder / "labels.npy", labels)
    np.save(folder / "parts.npy", parts)
    np.save(folder / "digests.npy", digests)
    return pixel_std(counts)


def _counted(
    blocks: Iterable[NDArray[np.uint8]], parts: NDArray[np.uint8], counts: NDArray[np.int64]
) -> Iterator[NDArray[np.uint8]]:
    """Yields the blocks, adding the pixel values of their train images to `counts`."""
    start = 0
    for block in blocks:
        train = parts[start : start + len(block)] == PARTS.index("train")
        counts += np.bincount(block[train].reshape(-1), minlength=256)
        start += len(block)
        yield block


def pixel_std(counts: NDArray[np.int64]) -> float:
    """The standard deviation of pixels scaled to [-1, 1], from how often each value 0 to 255 occurs; six digits."""
    values = [(value, int(count)) for value, count in enumerate(counts)]
    total = sum(count for _, count in values)
    first = sum(value * count for value, count in values)
    second = sum(value * value * count for value, count in values)
    return round(math.sqrt((total * second - first * first) / max(total, 1) ** 2) / 127.5, 6)


def write_lmdb(path: Path, pairs: Iterable[tuple[bytes, Any]], *, values: int, value_bytes: int) -> None:
    """Writes `values` sorted pairs of at most `value_bytes` each as a new LMDB file: the same bytes each time.

    Map size and commits depend on the two numbers alone, so that nothing in the file depends on how it came about.
    Raises SurroundingsError where the disk is full, InputError where a value is larger than LMDB holds.
    """
    if value_bytes > LARGEST_VALUE:
        raise InputError(f"an LMDB value of {value_bytes} bytes is too large: lower data.images_per_value")
    per_commit = max(1, COMMIT_BYTES // value_bytes)
    map_size = 2 * (values + 64) * PAGE + values * (-(-value_bytes // PAGE) + 1) * PAGE
    try:
        disk = os.statvfs(path.parent)
        if values * value_bytes > disk.f_bavail * disk.f_frsize:  # LMDB itself calls it an input/output error
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        bar = Bar("store", values, unit="value")
        env = lmdb.open(
            str(path), subdir=False, lock=False, sync=False, metasync=False, map_size=map_size, meminit=True
        )
        with env:
            for batch in _batches(pairs, per_commit):
                with env.begin(write=True) as transaction:
                    transaction.cursor().putmulti(batch, append=True)
                bar.advance(len(batch))
            env.sync(True)
        bar.close()
    except (lmdb.Error, OSError) as error:
        raise SurroundingsError(f"{path} could not be written: {_reason(error)}") from error


def _batches(pairs: Iterable[tuple[bytes, Any]], size: int) -> Iterator[list[tuple[bytes, Any]]]:
    batch = []
    for pair in pairs:
        batch.append(pair)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _key(number: int) -> bytes:
    return b"%010d" % number


def export_dmd2(dataset: Dataset, indices: NDArray[np.int64], path: Path) -> None:
    """Writes images and labels in DMD2's layout: `images_{i}_data` (uint8 CHW), `labels_{i}_data` (int64), shapes.

    Raises InputError if the dataset has no labels, and if `path` is there and was not written by this function.
    """
    if not dataset.classes:
        raise InputError(f"{dataset.artifact.path} has no labels, and DMD2's layout holds one for each image")
    count, side = len(indices), dataset.resolution
    keys = sorted([(b"images_%d_data" % i, i) for i in range(count)])

    def pairs() -> Iterator[tuple[bytes, bytes]]:
        for start in range(0, count, 256):
            batch = keys[start : start + 256]
            images = dataset.images(indices[[i for _, i in batch]]).transpose(0, 3, 1, 2)
            yield from ((key, image.tobytes()) for (key, _), image in zip(batch, images, strict=True))
        yield b"images_shape", f"{count} {dataset.channels} {side} {side}".encode()
        for key, i in keys:
            yield key.replace(b"images", b"labels"), dataset.labels[indices[i]].tobytes()
        yield b"labels_shape", f"{count}".encode()
        yield b"made_by", outputs.MADE_BY.encode()

    with outputs.new_file(path, outputs.LMDB) as partial:
        write_lmdb(partial, pairs(), values=2 * count + 3, value_bytes=max(dataset.layout.image_bytes, 64))
