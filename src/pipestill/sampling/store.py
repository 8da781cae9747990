"""Samples artefacts: images in item order in few `.npy` shards, labels, an index and a grid picture.

Item order is seed by seed: images 0..n-1 of the first seed, then those of the second. Of a run that stores features
there are tables of these in the same order instead, and the images that people look at. It may touch the artefact's
folder alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipestill import artifacts
from pipestill.artifacts import Artifact
from pipestill.errors import InputError
from pipestill.sampling.pictures import grid, pick_classes, pick_items, save_png

SHARD_BYTES = 128 * 2**20
KEPT, FEATURES = "images.npy", "features-{}.npy"
GRID_ROWS, GRID_COLUMNS, MOST_CLASS_COLUMNS = 10, 10, 16


@dataclass(frozen=True)
class Samples:
    """An open samples artefact."""

    artifact: Artifact
    index: Mapping[str, Any]
    labels: NDArray[np.int64]  # [count], -1 where an image was asked for without a class

    @property
    def count(self) -> int:
        """Images of all seeds together."""
        return len(self.labels)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.index["seeds"])

    @property
    def images_per_seed(self) -> int:
        return int(self.index["images_per_seed"])

    @property
    def plan(self) -> str:
        """The plan by which classes were chosen, as runs have it."""
        return str(self.index["plan"])

    @property
    def spaces(self) -> tuple[str, ...]:
        """Spaces whose features are kept instead of images; () where images are kept."""
        return tuple(self.index.get("features", ()))

    def features(self, space: str) -> NDArray[np.float32]:
        """The features [count, d] of a space, in item order, mapped from disk."""
        table: NDArray[np.float32] = np.load(self.artifact.file(FEATURES.format(space)), mmap_mode="c")
        return table

    def picture(self, item: int) -> NDArray[np.uint8] | None:
        """Image `item` [H, W, C], or None where its features alone were kept."""
        if not self.spaces:
            found: NDArray[np.uint8] = self.images(item, item + 1)[0]
            return found
        kept = self.index["kept"]
        if item not in kept:
            return None
        image: NDArray[np.uint8] = np.load(self.artifact.file(KEPT), mmap_mode="r")[kept.index(item)]
        return image

    def images(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Images [start, stop) in item order: uint8 [stop - start, H, W, C]. Raises IndexError outside 0..count.

        Raises InputError where features were kept instead.
        """
        if self.spaces:
            raise InputError(f"{self.artifact.path} holds features, not images: sample with store=images")
        if not 0 <= start <= stop <= self.count:
            raise IndexError(f"images {start}..{stop} of {self.count}")
        parts = []
        for shard in self.index["shards"]:
            first, last = shard["first"], shard["first"] + shard["count"]
            if start < last and first < stop:
                table = np.load(self.artifact.path / shard["file"], mmap_mode="r")
                parts.append(table[max(start - first, 0) : min(stop, last) - first])
        height, width, channels = self.index["shape"]
        return np.concatenate(parts) if parts else np.empty((0, height, width, channels), np.uint8)


def open_samples(path: Path) -> Samples:
    """Opens a samples artefact. Raises InputError where it is none, not whole, or its index cannot be read."""
    artifact = artifacts.read(path, "samples")
    try:
        index = json.loads(artifact.file("index.json").read_text(encoding="utf-8"))
        labels = np.load(artifact.file("labels.npy"))
        total = sum(shard["count"] for shard in index["shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}): rebuild it with pipestill sample") from error
    if "features" not in index and total != len(labels):
        raise InputError(f"{path} holds {total} images and {len(labels)} labels: rebuild it with pipestill sample")
    return Samples(artifact, index, labels)


def write_samples(
    folder: Path,
    parts: Iterable[NDArray[np.uint8]],
    *,
    labels: NDArray[np.int64],
    shape: Sequence[int],
    index: Mapping[str, Any],
) -> None:
    """Fills `folder` from `parts` (uint8 [n, H, W, C] in item order, as many images as labels).

    `index` is kept beside what is known here: the shards and the images' `shape` (H, W, C). Memory is one shard's.
    """
    size = max(1, SHARD_BYTES // int(np.prod(shape)))
    total, written = len(labels), 0
    shards: list[dict[str, Any]] = []
    waiting = np.empty((0, *shape), np.uint8)
    source = iter(parts)
    while written < total:
        wanted = min(size, total - written)
        pieces = [waiting]
        while sum(map(len, pieces)) < wanted:
            pieces.append(next(source))
        table = np.concatenate(pieces)
        shard, waiting = table[:wanted], table[wanted:]
        name = f"images-{len(shards):05d}.npy"
        np.save(folder / name, shard)
        if not shards:
            save_png(_overview(shard, len(np.unique(labels)) if _balanced(index) else 0), folder / "grid.png")
        shards.append({"file": name, "first": written, "count": wanted})
        written += wanted
    _write_index(folder, labels, {**index, "shards": shards, "shape": list(shape)})


def kept_items(labels: NDArray[np.int64], classes: Sequence[int]) -> list[int]:
    """Items whose images are kept beside features: those that a report shows by default, and the first ones.

    Ascending, GRID_ROWS x GRID_COLUMNS of them where there are so many.
    """
    shown = pick_items(labels, pick_classes(classes, GRID_ROWS), GRID_COLUMNS, GRID_ROWS)
    kept = dict.fromkeys([*(item for item in shown if item is not None), *range(len(labels))])
    return sorted(list(kept)[: GRID_ROWS * GRID_COLUMNS])


def write_features(
    folder: Path,
    parts: Iterable[NDArray[np.float32]],
    spaces: Mapping[str, int],
    kept: Sequence[int],
    images: NDArray[np.uint8],
    *,
    labels: NDArray[np.int64],
    shape: Sequence[int],
    index: Mapping[str, Any],
) -> None:
    """Fills `folder` from `parts` (float32 [n, sum of dimensions] in item order, as many rows as labels).

    `spaces` are the dimensions of the spaces in a row, in order; `images` [len(kept), H, W, C] are kept for people.
    """
    bounds = np.cumsum([0, *spaces.values()])
    with ExitStack() as stack:
        tables = [stack.enter_context((folder / FEATURES.format(space)).open("wb")) for space in spaces]
        for table, dimension in zip(tables, spaces.values(), strict=True):
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(labels), dimension)}
            np.lib.format.write_array_header_1_0(table, header)
        for rows in parts:
            for number, table in enumerate(tables):
                table.write(rows[:, bounds[number] : bounds[number + 1]].astype("<f4").tobytes())
    np.save(folder / KEPT, images)
    few = len(np.unique(labels)) if _balanced(index) else 0
    save_png(_overview(images, few if few <= GRID_ROWS else 0), folder / "grid.png")
    body = {**index, "shards": [], "shape": list(shape), "features": dict(spaces), "kept": list(kept)}
    _write_index(folder, labels, body)


def _write_index(folder: Path, labels: NDArray[np.int64], body: Mapping[str, Any]) -> None:
    np.save(folder / "labels.npy", labels)
    (folder / "index.json").write_text(
        json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _balanced(index: Mapping[str, Any]) -> bool:
    """Whether the items show the classes in turn."""
    return bool(index.get("plan") == "balanced")


def _overview(images: NDArray[np.uint8], classes: int) -> NDArray[np.uint8]:
    """The first images as a grid; with balanced `classes` (0 for other ones) a column each, where there are few."""
    columns = classes if 1 < classes <= MOST_CLASS_COLUMNS else GRID_COLUMNS
    return grid(images[: GRID_ROWS * columns], columns=columns)
