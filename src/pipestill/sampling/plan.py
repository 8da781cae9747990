"""What is sampled: which class each item shows, and how items fall into fixed blocks. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipestill import counter, mixes

UNCONDITIONAL = -1  # the label of an item that is asked for without a class


@dataclass(frozen=True)
class Block:
    """Items [first, first + count) of one seed; networks see it padded to the micro-batch."""

    seed: int
    first: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.seed:010d}-{self.first:010d}"


def blocks(seeds: Sequence[int], images: int, micro_batch: int) -> list[Block]:
    """The blocks of `images` items for each seed, in item order; each seed's last one may be short."""
    return [
        Block(seed, first, min(micro_batch, images - first))
        for seed in seeds
        for first in range(0, images, micro_batch)
    ]


def labels_in(mix: NDArray[np.int64], images: int) -> Tensor:
    """Labels of items in a class mix, int64 [images] on the host; 0 for data without classes."""
    return torch.from_numpy(mixes.sequence(mix, images)) if mix.any() else torch.zeros(images, dtype=torch.int64)


def listed(images: int, chosen: Sequence[int]) -> NDArray[np.int64]:
    """The chosen classes in turn, at least one; one that is listed twice gets twice as many items."""
    return np.resize(np.asarray(chosen, dtype=np.int64), images)


def drawn(images: int, filled: Sequence[int]) -> NDArray[np.int64]:
    """Uniform over the classes `filled`, a function of the item alone: counts differ by chance, as in EDM's sets."""
    places = counter.integers(0, "plan/drawn", torch.arange(images), len(filled))
    return np.take(np.asarray(filled, dtype=np.int64), places.numpy())


def without_classes(images: int) -> NDArray[np.int64]:
    """No class for any item."""
    return np.full(images, UNCONDITIONAL, dtype=np.int64)
