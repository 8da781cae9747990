"""Whether a dataset is large enough for what is measured against it: asked before any feature is computed.

Pure, and without torch, so that `pipestill dataset --check` can say the same as `pipestill reference` would.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pipestill.config import ReferenceParams
from pipestill.mixes import agree


def misfits(params: ReferenceParams, sizes: Mapping[str, int], train: Mapping[str, int], *, where: object) -> list[str]:
    """Everything that `reference` would refuse, a line each.

    `sizes` are images by part, `train` the train images of each class ({} without labels), `where` is what has them.
    """
    found = [
        f"{where} has {sizes[part]} {part} images, at least 2 are needed: set data.split"
        for part in ("train", "test")
        if sizes[part] < 2
    ]
    if "classifier" in params.protocol.extractors and not train:
        found.append(
            f"{where} has no labels, so there is no classifier to measure with: "
            "take classifier out of reference.protocol.extractors"
        )
    if not params.floor.counts:
        found.append(
            "reference.floor.counts is empty: give the numbers of images that are measured, as in sampling.runs"
        )
    return found or _too_few(params, sizes) or _too_few_of_a_class(params, train)


def _too_few(params: ReferenceParams, sizes: Mapping[str, int]) -> list[str]:
    found, protocol = [], params.protocol
    largest, smallest = max(params.floor.counts), min(params.floor.counts)
    if largest > sizes["train"]:
        found.append(
            f"runs have {largest} images, and as many cannot be drawn from {sizes['train']} train images for a floor: "
            f"set sampling.shared.images={sizes['train']} or less with pipestill config, reference.floor.counts follows"
        )
        smallest = min(smallest, sizes["train"])  # what will be left of them
    fewest = min(smallest, sizes["test"])
    if protocol.kid_subset_size > fewest or protocol.kid_subset_size < 2:
        found.append(
            f"reference.protocol.kid_subset_size={protocol.kid_subset_size}: subsets are drawn from "
            f"{sizes['test']} test images and from {smallest} measured ones, so 2 to {fewest} fit"
        )
    if protocol.neighbours >= fewest:
        found.append(
            f"reference.protocol.neighbours={protocol.neighbours}: there are {fewest} images, "
            f"so at most {fewest - 1} neighbours fit"
        )
    return found


def _too_few_of_a_class(params: ReferenceParams, train: Mapping[str, int]) -> list[str]:
    """A floor in equal shares takes as many images of each class, and none twice."""
    filled = {name: count for name, count in train.items() if count}
    if "balanced" not in params.floor.plans or not filled or agree(np.array([*filled.values()]), np.ones(len(filled))):
        return []
    most, scarce = len(filled) * min(filled.values()), min(filled, key=lambda name: filled[name])
    if max(params.floor.counts) <= most:
        return []
    return [
        f"runs with plan=balanced have {max(params.floor.counts)} images in {len(filled)} classes, and class "
        f"'{scarce}' has only {filled[scarce]} train images for their floor: with pipestill config set "
        f"sampling.shared.plan=data, or sampling.shared.images={most} or less"
    ]
