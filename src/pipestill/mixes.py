"""Class mixes: how often each class occurs, and the labels and weights that follow. Pure functions of numpy arrays.

A mix is an array of one non-negative number per class, in any unit; a class without images has 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pipestill.config.fields import MixName

WITHIN, SHARE = 2, 0.05  # images of a class, and share of them, by which a split of whole images may miss a mix


def counts(labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Images per class, int64 [classes]; labels below 0 belong to no class."""
    return np.bincount(labels[labels >= 0], minlength=classes).astype(np.int64)


def of_plan(plan: MixName, images: NDArray[np.int64]) -> NDArray[np.int64]:
    """The mix of a plan, from the train part's images per class: `data` as they are, `balanced` 1 for any."""
    return images if plan == "data" else (images > 0).astype(np.int64)


def sequence(mix: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Classes of items 0 to `length` - 1, int64, spread evenly so that every prefix is in the mix.

    The j-th item of a class with share p stands at time (j + 1/2) / p, and items are ordered by time, which is
    Sainte-Laguë's apportionment. An item's class does not depend on `length`. Equal shares give the classes in turn.
    """
    classes, total = np.flatnonzero(mix), int(mix.sum())
    sizes = [int(mix[index] * (length + len(classes) / 2) / total) + 2 for index in classes]
    times = [(np.arange(size) + 0.5) / mix[index] for index, size in zip(classes, sizes, strict=True)]
    order = np.argsort(np.concatenate(times), kind="stable")[:length]
    labels: NDArray[np.int64] = np.repeat(classes, sizes)[order].astype(np.int64)
    return labels


def apportioned(mix: NDArray[Any], total: int) -> NDArray[np.int64]:
    """`total` images divided in the proportions of a mix by largest remainder, ties by class: int64 [classes]."""
    exact = total * mix / mix.sum()
    shares: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - shares), kind="stable")
    shares[order[: total - int(shares.sum())]] += 1
    return shares


def agree(images: NDArray[np.int64], mix: NDArray[Any]) -> bool:
    """Whether images per class are in a mix, as far as whole images allow.

    A class may be less than one image from its share, or as far as a split of a larger part may miss it.
    """
    exact = images.sum() * mix / mix.sum()
    missed = np.abs(images - exact)
    return bool(((missed < 1) | (missed <= np.minimum(WITHIN, SHARE * exact))).all())


def weights(labels: NDArray[np.int64], mix: NDArray[Any]) -> NDArray[np.float64] | None:
    """Weight of each image, float64 [n] of sum 1, by which images with these labels are in the mix.

    None if they are in it already. Classes of the mix that have no image are left out of it.
    """
    images = counts(labels, len(mix))
    common = np.where(images > 0, mix, 0).astype(np.float64)
    if not common.any() or agree(images, common):
        return None
    each = common / common.sum() / np.maximum(images, 1)
    found: NDArray[np.float64] = each[labels]
    return found


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names for a message, the first few of many."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
