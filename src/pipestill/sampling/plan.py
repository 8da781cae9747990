"""What is sampled: which class each item shows, and how items fall into fixed blocks. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipestill import counter
from pipestill.errors import InputError

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


def balanced(images: int, classes: int) -> NDArray[np.int64]:
    """Item i shows class i mod `classes`: exactly equal counts where `classes` divides `images`, else one apart."""
    if classes < 1:
        raise InputError("plan=balanced needs a model with classes: use plan=none for an unconditional one")
    return np.arange(images, dtype=np.int64) % classes


def listed(images: int, chosen: Sequence[int]) -> NDArray[np.int64]:
    """The chosen classes in turn, at least one; one that is listed twice gets twice as many items."""
    return np.resize(np.asarray(chosen, dtype=np.int64), images)


def as_in_data(images: int, labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Classes in the proportions of `labels` (largest remainders), spread evenly over the items."""
    counts = np.bincount(labels, minlength=classes).astype(np.int64)
    if counts.sum() == 0:
        raise InputError("plan=data needs a dataset with labels in its train part")
    share, remainder = np.divmod(counts * images, counts.sum())
    for index in np.argsort(-remainder, kind="stable")[: images - int(share.sum())]:
        share[index] += 1
    order = np.repeat(np.arange(classes), share)
    position = np.concatenate([(np.arange(n) + 0.5) / n for n in share if n] or [np.empty(0)])
    return order[np.argsort(position, kind="stable")].astype(np.int64)


def drawn(images: int, classes: int) -> NDArray[np.int64]:
    """Uniform classes, a function of the item alone: counts differ by chance, as in EDM's sets for its distances."""
    if classes < 1:
        raise InputError("plan=drawn needs a model with classes: use plan=none for an unconditional one")
    return counter.integers(0, "plan/drawn", torch.arange(images), classes).numpy()


def without_classes(images: int) -> NDArray[np.int64]:
    """No class for any item."""
    return np.full(images, UNCONDITIONAL, dtype=np.int64)
