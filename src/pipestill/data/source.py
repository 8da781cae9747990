"""What a source of images is: an ordered list to read from, with labels where there are any.

A source is listed in the calling process and read in any process that inherits it by fork; what lies there is only
read. Names are sorted, so the order is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipestill.errors import InputError

Content = bytes | NDArray[np.uint8]


@dataclass(frozen=True)
class Source:
    """Images in their canonical order.

    `labels` int64 [N] index into `classes` (-1 and () without labels); `parts` uint8 [N] where the source itself
    says what is for training; `strays` are files that belong to no class, with the reason; `files` is what the source
    consists of, by name; `read` gives an encoded file or pixels uint8 [H, W, C].
    """

    names: Sequence[str]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    read: Callable[[int], Content]
    files: dict[str, Path]
    parts: NDArray[np.uint8] | None = None
    strays: dict[str, str] = field(default_factory=dict)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Class names, sorted; by value if all of them are whole numbers, so that 2 comes before 10."""
    found = sorted(names)
    if all(name.isascii() and name.isdigit() for name in found):
        found.sort(key=int)
    return tuple(found)


def without_labels(names: Sequence[str]) -> NDArray[np.int64]:
    """The labels of images that have none: -1 each."""
    return np.full(len(names), -1, dtype=np.int64)


def numbered(
    labels: Sequence[Any], where: Path, *, from_one: bool = False
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels that are class numbers already: kept as they are, so that a network's class k stays class k.

    Raises InputError where they are no whole numbers from 0 on.
    """
    if not all(isinstance(label, int) and not isinstance(label, bool) and label >= 0 for label in labels):
        wrong = next(label for label in labels if not isinstance(label, int) or isinstance(label, bool) or label < 0)
        raise InputError(f"{where}: label {repr(wrong)[:40]} is no class number (0, 1, 2, …)")
    first = 1 if from_one and labels and min(labels) == 1 else 0
    highest = max(labels, default=-1)
    if highest >= 2**20:
        raise InputError(f"{where}: label {highest} is no class number: they run from 0 to below {2**20}")
    return np.array(labels, dtype=np.int64) - first, tuple(str(number) for number in range(first, highest + 1))
