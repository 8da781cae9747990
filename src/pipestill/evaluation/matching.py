"""What the test part has to look like so that a run is compared with images of its own class mix.

Moments are taken of weighted images, and KID, precision and recall of resampled ones. Where the part is in the mix
already, as far as whole images allow, it is taken as it is. Reads a reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipestill import counter, mixes
from pipestill.config import mix_of

if TYPE_CHECKING:
    from pipestill.evaluation.reference import Reference

RESAMPLES = 5  # of the test part, for precision and recall


@dataclass(frozen=True)
class Match:
    """How the test part is taken for runs of one plan.

    `weights` [n] of sum 1 are None where it is taken as it is. `subsets` are the real images of each KID subset and
    `resamples` those of precision and recall, None where too few images of a class make them impossible. `notes`
    says what could not be made equal, or is not reported.
    """

    plan: str
    weights: Tensor | None = None
    subsets: Sequence[Tensor] | None = None
    resamples: Sequence[Tensor] | None = None
    notes: tuple[str, ...] = ()


def match(reference: Reference, plan: str) -> Match:
    """How the test part is taken for runs of a plan (RunParams.plan)."""
    notes = []
    if reference.index.statistics:
        notes.append("fd_inception: the class mix of the outside statistics is unknown")
    if not reference.classes:
        return Match(plan, notes=(*notes, "the data has no labels, so class mixes are unknown"))
    train = reference.counts("train")
    if not train.all():
        names = mixes.listed([reference.classes[index] for index in np.flatnonzero(train == 0)])
        notes.append(f"classes without images are left out: {names}")
    if plan not in ("balanced", "drawn", "data"):
        what = "chosen classes" if plan == "listed" else "no classes"
        notes.append(f"plan={plan} samples {what}, the test images have all classes in the mix of the data")
    labels, test = reference.labels("test").numpy(), reference.counts("test")
    mix = mixes.of_plan(mix_of(plan), train)
    lacking = np.flatnonzero((mix > 0) & (test == 0))
    if len(lacking):
        names = mixes.listed([reference.classes[index] for index in lacking])
        notes.append(f"{mix[lacking].sum() / mix.sum():.3g} of the images are of classes without test images: {names}")
    weights = mixes.weights(labels, mix)
    if weights is None:
        return Match(plan, notes=tuple(notes))
    common = np.where(test > 0, mix, 0)
    subsets, resamples = _subsets(reference, labels, common), _resamples(reference, labels, common)
    present = np.flatnonzero(common)
    scarce = present[np.argmin(test[present] / common[present])]
    few = f"class '{reference.classes[scarce]}' has only {test[scarce]} test images"
    if subsets is None:
        notes.append(f"no KID: {few}, too few for subsets in this mix")
    if resamples is None:
        notes.append(f"no precision and recall: {few}, too few for a subset in this mix")
    return Match(plan, torch.from_numpy(weights), subsets, resamples, tuple(notes))


def _subsets(reference: Reference, labels: NDArray[np.int64], mix: NDArray[np.int64]) -> list[Tensor] | None:
    """Rows of the real images of each KID subset: classes drawn independently, then different images of each class.

    Then any two images of a subset are distributed as two independent ones of the mix, and the unbiased MMD² stays so.
    """
    protocol, found = reference.protocol, []
    draw = np.random.RandomState(protocol.seed)
    members = [np.flatnonzero(labels == index) for index in range(len(mix))]
    for _ in range(protocol.kid_subsets):
        sizes = draw.multinomial(protocol.kid_subset_size, mix / mix.sum())
        if any(size > len(own) for size, own in zip(sizes, members, strict=True)):
            return None
        rows = [draw.choice(own, size, replace=False) for size, own in zip(sizes, members, strict=True) if size]
        found.append(torch.from_numpy(np.concatenate(rows)))
    return found


def _resamples(reference: Reference, labels: NDArray[np.int64], mix: NDArray[np.int64]) -> list[Tensor] | None:
    """Rows of the largest subsets of the part that are in the mix, without repetition."""
    images = mixes.counts(labels, len(mix))
    common = mix > 0
    total = int((images[common] * int(mix.sum()) // mix[common]).min())
    sizes = np.minimum(mixes.apportioned(mix, total), images)
    if sizes.sum() <= reference.protocol.neighbours:
        return None
    seed = reference.protocol.seed
    return [chosen(labels, sizes, seed=seed, purpose="resample", draw=draw) for draw in range(RESAMPLES)]


def chosen(labels: NDArray[np.int64], sizes: NDArray[np.int64], *, seed: int, purpose: str, draw: int) -> Tensor:
    """`sizes[c]` positions of each class c without repetition, sorted int64; a function of (seed, purpose, draw)."""
    keys = counter.uniform(seed, purpose, torch.arange(len(labels)), draw=draw).numpy()
    order = np.lexsort((keys, labels))
    starts = np.searchsorted(labels[order], np.arange(len(sizes)))
    rows = [order[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    return torch.from_numpy(np.sort(np.concatenate(rows)))
