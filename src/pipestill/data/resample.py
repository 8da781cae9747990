"""Pillow's bicubic enlarging for a window of the result, so that a long image need not be enlarged as a whole.

Equal, bit for bit, to resizing with Pillow and cropping: weights are multiples of 2^-22, columns come before rows, and
what is between the two is rounded to 8 bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UNIT = 22  # bits of Pillow's fixed-point weights
TAPS = 5  # an enlarged pixel is made of at most so many


def enlarged_middle(pixels: NDArray[np.uint8], height: int, width: int, side: int) -> NDArray[np.uint8]:
    """The middle square [side, side, C] of `pixels` [H, W, C] enlarged to [height, width, C]."""
    (rows, down), (columns, across) = _weights(len(pixels), height, side), _weights(pixels.shape[1], width, side)
    needed = pixels[rows.min() : rows.max() + 1]
    wide = _applied(needed.swapaxes(0, 1), columns, across).swapaxes(0, 1)
    return _applied(wide, rows - rows.min(), down)


def _weights(length: int, size: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """For the middle `side` of `size` pixels made of `length`: the source pixels [side, TAPS] and their weights."""
    first = (size - side) // 2
    centre = ((np.arange(first, first + side) + 0.5) * (length / size))[:, None]
    start, stop = np.maximum(np.trunc(centre - 1.5), 0), np.minimum(np.trunc(centre + 2.5), length)
    at = start + np.arange(TAPS)
    weights = np.where(at < stop, _bicubic(np.abs(at - centre + 0.5)), 0.0)
    total = weights[:, 0].copy()
    for tap in range(1, TAPS):
        total += weights[:, tap]  # in the order of Pillow's sum
    weights /= total[:, None]
    fixed = np.trunc(weights * (1 << UNIT) + np.where(weights < 0, -0.5, 0.5)).astype(np.int32)
    return np.minimum(at, length - 1).astype(np.int64), fixed


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' filter with a = -0.5, for distances x >= 0."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _applied(pixels: NDArray[np.uint8], at: NDArray[np.int64], weights: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Each row of the result as a weighted sum of rows of `pixels`, rounded to 8 bits."""
    total = np.full((len(at), *pixels.shape[1:]), 1 << (UNIT - 1), dtype=np.int32)
    for tap in range(TAPS):
        total += weights[:, tap, None, None] * pixels[at[:, tap]]
    result: NDArray[np.uint8] = np.clip(total >> UNIT, 0, 255).astype(np.uint8)
    return result
