"""The split into train, validation and test: a pure function of labels, fractions and a seed."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pipestill import philox

TRAIN, VALIDATION, TEST = range(3)


def stratified(labels: NDArray[np.int64], *, validation: float, test: float, seed: int) -> NDArray[np.uint8]:
    """The part of each image, uint8 [N] (0 train, 1 validation, 2 test), drawn within classes.

    Totals are within one image of their fractions of N, each class is within two images of its shares, and every class
    keeps at least one image to train on. Labels [N] of -1 (unlabelled) count as one class.
    """
    parts = np.full(len(labels), TRAIN, dtype=np.uint8)
    keys = philox.keys64(seed, "split", np.arange(len(labels), dtype=np.int64))
    order = np.lexsort((keys, labels))
    seen = 0
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        start, seen = seen, seen + len(members)
        to_test = _share(test, start, seen)
        to_either = _share(test + validation, start, seen)
        to_either = min(to_either, len(members) - 1)
        parts[members[:to_either]] = VALIDATION
        parts[members[: min(to_test, to_either)]] = TEST
    return parts


def _share(fraction: float, start: int, stop: int) -> int:
    """How many of the images from `start` to `stop`, so that shares of consecutive classes add up to the whole's."""
    return math.floor(stop * fraction + 0.5) - math.floor(start * fraction + 0.5)
