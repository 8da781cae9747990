"""Which part each image goes to: as the source says, or drawn from labels and from what has to stay together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipestill.config import DataParams
from pipestill.data import split
from pipestill.data.duplicates import NearPairs, first_of, near_pairs
from pipestill.data.store import PARTS
from pipestill.errors import InputError

LISTED = 100  # of each kind of finding, in the report; counts are always of all


@dataclass(frozen=True)
class Division:
    """The part of each image [N]; what was kept together, for the report; the near pairs, if they were searched."""

    parts: NDArray[np.uint8]
    together: dict[str, Any] | None = None
    near: NearPairs | None = None


def divide(
    labels: NDArray[np.int64], facts: NDArray[Any], stated: NDArray[np.uint8] | None, data: DataParams
) -> Division:
    """Divides images [N] with their facts (digests and hashes); `stated` are the parts that the source gives.

    Raises InputError if near images cannot be kept together, because too many are alike to compare them all.
    """
    drawn = data.split
    if drawn.by != "fraction":
        return Division(np.zeros(len(labels), dtype=np.uint8) if stated is None else stated)
    alone = split.stratified(labels, validation=drawn.validation, test=drawn.test, seed=drawn.seed)
    if drawn.together == "none":
        return Division(alone)
    groups, near = first_of(facts["digest"]), None
    if drawn.together == "near":
        single, which = np.unique(groups, return_inverse=True)
        near = near_pairs(facts["hash"][single], alone[single] * 0, bits=data.near_duplicate_bits, listed=LISTED)
        if not near.complete:
            raise InputError(
                "data.split.together=near: too many images are alike to compare them all; "
                "lower data.near_duplicate_bits, or set data.split.together=repeats"
            )
        groups = near.groups[which]
    parts = split.together(labels, groups, validation=drawn.validation, test=drawn.test, seed=drawn.seed)
    sizes = np.unique(groups, return_counts=True)[1]
    report = {
        "kept": {"repeats": "repeats", "near": "near pairs"}[drawn.together],
        "groups": int((sizes > 1).sum()),
        "images": int(sizes[sizes > 1].sum()),
        "largest": int(sizes.max(initial=0)),
        "would_cross": crossing(groups, alone),
        "wanted": {name: int((alone == code).sum()) for code, name in enumerate(PARTS)},
    }
    return Division(parts, report, near)


def crossing(groups: NDArray[np.int64], parts: NDArray[np.uint8]) -> int:
    """How many groups [N] have images in several parts [N]."""
    numbers, group = np.unique(groups, return_inverse=True)
    lowest, highest = np.full(len(numbers), len(PARTS)), np.full(len(numbers), -1)
    np.minimum.at(lowest, group, parts)
    np.maximum.at(highest, group, parts)
    return int((lowest < highest).sum())
