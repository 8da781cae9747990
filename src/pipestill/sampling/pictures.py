"""Pictures for people: which items are shown, and grids of them as PNG, the same bytes for the same pixels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipestill.work import write_atomic

SMALLEST_SIDE = 32  # a cell smaller than this is enlarged by a whole factor, nearest pixel


def grid(images: NDArray[np.uint8], *, columns: int, gap: int = 2) -> NDArray[np.uint8]:
    """Images uint8 [N, H, W, C] in rows of `columns`, white gaps of `gap` pixels between: uint8 [H', W', C]."""
    factor = max(1, -(-SMALLEST_SIDE // images.shape[1]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, channels)
    picture = np.full(shape, 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        picture[top : top + height, left : left + width] = image
    return picture


def png_bytes(picture: NDArray[np.uint8]) -> bytes:
    """uint8 [H, W, 1 or 3] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(buffer, "PNG")
    return buffer.getvalue()


def save_png(picture: NDArray[np.uint8], path: Path) -> None:
    """Writes a picture whole or not at all."""
    write_atomic(path, png_bytes(picture))


def pick_classes(classes: Sequence[int], most: int) -> list[int]:
    """All of these classes, or `most` of them evenly spread from first to last."""
    if len(classes) <= most:
        return list(classes)
    if most == 1:
        return [classes[0]]
    return [classes[round(row * (len(classes) - 1) / (most - 1))] for row in range(most)]


def pick_items(labels: NDArray[np.int64], rows: Sequence[int], columns: int, unlabelled_rows: int) -> list[int | None]:
    """Item numbers row by row: the first `columns` of each class, None where a class has fewer.

    Unconditional samples (no rows, or labels of -1) are shown in item order.
    """
    if not rows or not np.any(labels >= 0):
        count = unlabelled_rows * columns
        return [item if item < len(labels) else None for item in range(count)]
    items: list[int | None] = []
    for row in rows:
        found = np.flatnonzero(labels == row)[:columns].tolist()
        items += [*found, *[None] * (columns - len(found))]
    return items
