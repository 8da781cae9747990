"""The split into train, validation and test: a pure function of labels, groups, fractions and a seed."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pipestill import philox

TRAIN, VALIDATION, TEST = range(3)
PART_COUNT = 3


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


def together(
    labels: NDArray[np.int64], groups: NDArray[np.int64], *, validation: float, test: float, seed: int
) -> NDArray[np.uint8]:
    """As `stratified`, with all images of a group [N] in one part.

    Each class has as many images in each part as `stratified` gives it, as far as its groups allow: the largest groups
    are placed first, at random among the parts that have room for them, or else in the part that they overfill least;
    single images fill up the rest. Every class keeps an image to train on. Without groups the two functions agree.
    """
    alone = stratified(labels, validation=validation, test=test, seed=seed)
    classes, label = np.unique(labels, return_inverse=True)
    left = np.zeros((len(classes), PART_COUNT), dtype=np.int64)  # images of each class that each part has room for
    np.add.at(left, (label, alone), 1)
    parts = alone.copy()
    free = left.sum(axis=1)  # images of each class that have no part yet
    trained = np.zeros(len(classes), dtype=np.int64)
    single = np.ones(len(labels), dtype=bool)
    for group, key in _largest_first(groups, seed):
        own, counts = np.unique(label[group], return_counts=True)
        room = left[own]
        over = np.maximum(counts[:, None] - room, 0).sum(axis=0)
        if not (trained[own] + free[own] - counts > 0).all():
            over[[VALIDATION, TEST]] = len(labels)  # a class would have nothing to train on
        weights = np.where(over == 0, room.sum(axis=0), 0)
        part = int(np.argmin(over))
        if over[part] == 0:
            part = int(np.searchsorted(np.cumsum(weights), key * int(weights.sum()) >> 64, side="right"))
        parts[group], single[group] = part, False
        left[own, part] -= counts
        free[own] -= counts
        trained[own] += counts * (part == TRAIN)
    keys = philox.keys64(seed, "split", np.arange(len(labels), dtype=np.int64))
    for number in np.flatnonzero(free) if not single.all() else []:
        members = np.flatnonzero((label == number) & single)
        members = members[np.argsort(keys[members], kind="stable")]
        share = _apportioned(len(members), np.maximum(left[number], 0))
        if trained[number] + share[TRAIN] == 0:
            share[int(np.argmax(share))] -= 1
            share[TRAIN] = 1
        parts[members] = np.repeat([TEST, VALIDATION, TRAIN], share[::-1])
    return parts


def _largest_first(groups: NDArray[np.int64], seed: int) -> list[tuple[NDArray[np.int64], int]]:
    """The members of each group of several, with a uniform 64-bit number; equally large ones in random order."""
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1) if len(order) else []
    several = [group for group in members if len(group) > 1]
    keys = philox.keys64(seed, "split groups", np.array([group[0] for group in several], dtype=np.int64)).tolist()
    return sorted(zip(several, keys, strict=True), key=lambda item: (-len(item[0]), item[1]))


def _apportioned(count: int, room: NDArray[np.int64]) -> NDArray[np.int64]:
    """`count` images in proportion to the room of each part, by the largest remainders."""
    total = int(room.sum())
    if total == count:
        return room.copy()
    share, remainder = np.divmod(count * room, max(total, 1))
    most = np.argsort(-remainder, kind="stable")[: count - int(share.sum())]
    share[most] += 1
    return share
