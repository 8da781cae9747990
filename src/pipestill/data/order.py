"""The order in which training sees images: a stream of positions, epoch after epoch. Pure functions.

Position p belongs to epoch p // n and is the (p % n)-th image of that epoch's permutation, whoever asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipestill import philox
from pipestill.errors import InputError


@lru_cache(maxsize=4)
def permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of `count` images that epoch `epoch` goes through, int64 [count]."""
    order = _shuffle(count, seed, "order", epoch)
    order.flags.writeable = False
    return order


def _shuffle(count: int, seed: int, purpose: str, draw: int) -> NDArray[np.int64]:
    items = np.arange(count, dtype=np.int64)
    return np.argsort(philox.keys64(seed, purpose, items, draw=draw), kind="stable")


def positions(step: int, *, batch: int, rank: int = 0, size: int = 1) -> NDArray[np.int64]:
    """The positions of rank `rank`'s contiguous share of step `step`, int64 [batch / size]."""
    share = batch // size
    start = step * batch + rank * share
    return np.arange(start, start + share, dtype=np.int64)


def check_share(batch: int, size: int) -> None:
    """Raises InputError where ranks cannot take equal shares of a batch."""
    if batch % size:
        raise InputError(f"a batch of {batch} cannot be shared by {size} ranks: make it a multiple of {size}")


def images_at(stream: NDArray[np.int64], *, count: int, seed: int) -> NDArray[np.int64]:
    """Which of `count` images stands at each position, int64 like `stream`."""
    epochs, offsets = np.divmod(stream, count)
    out = np.empty_like(stream)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = permutation(count, seed, int(epoch))[offsets[here]]
    return out


def members(labels: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """For each class that has images, in order, which of them it has."""
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def balanced_at(stream: NDArray[np.int64], *, classes: Sequence[NDArray[np.int64]], seed: int) -> NDArray[np.int64]:
    """Which image stands at each position where every class has its turn equally often; `classes` as `members` gives.

    Each run of len(classes) positions has an image of every class, in an order of its own; a class goes through all
    its images before one comes again.
    """
    rounds, slots = np.divmod(stream, len(classes))
    out = np.empty_like(stream)
    for turn in np.unique(rounds):
        here = np.flatnonzero(rounds == turn)
        order = _kept(len(classes), seed, "order/classes", int(turn))
        for place, label in zip(here, order[slots[here]], strict=True):
            own = classes[label]
            again, offset = divmod(int(turn), len(own))
            out[place] = own[_kept(len(own), seed, f"order/class-{label}", again)[offset]]
    return out


_kept = lru_cache(maxsize=4096)(_shuffle)  # of classes, which are small and many
