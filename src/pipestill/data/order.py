"""The order in which training sees images: a stream of positions, epoch after epoch. Pure functions.

Position p belongs to epoch p // n and is the (p % n)-th image of that epoch's permutation, whoever asks for it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipestill import philox
from pipestill.errors import InputError


@lru_cache(maxsize=4)
def permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of `count` images that epoch `epoch` goes through, int64 [count]."""
    items = np.arange(count, dtype=np.int64)
    order = np.argsort(philox.keys64(seed, "order", items, draw=epoch), kind="stable")
    order.flags.writeable = False
    return order


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
