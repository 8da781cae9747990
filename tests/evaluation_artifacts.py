"""Handmade samples and datasets, published for real, for the commands that measure them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipestill import artifacts
from pipestill.artifacts import Artifact, Manifest
from pipestill.data.store import Layout, write_dataset
from pipestill.sampling.store import write_samples


def make_samples(
    path: Path,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    classes: Sequence[str],
    seeds: Sequence[int] = (0,),
    **named: Any,
) -> Artifact:
    """Publishes images uint8 [len(seeds) * n, H, W, C] with their labels as a samples artefact of `seeds`."""
    staging = path.with_name(f".{path.name}.partial")
    staging.mkdir(parents=True)
    index = {"seeds": list(seeds), "images_per_seed": len(images) // len(seeds), "classes": list(classes)}
    index |= {"evaluations": 4, "guidance": 1.0, "sampler": "euler", "steps": 4} | named
    write_samples(staging, [images], labels=labels, shape=images.shape[1:], index=index)
    manifest = Manifest(
        "samples", "sample", 1, {"name": path.name, "seeds": list(seeds)}, {}, artifacts.describe_files(staging)
    )
    return artifacts.publish(staging, path, manifest)


def make_dataset(
    path: Path, images: NDArray[np.uint8], labels: NDArray[np.int64], parts: NDArray[np.uint8], classes: Sequence[str]
) -> Artifact:
    """Publishes images uint8 [n, side, side, C] as a dataset artefact; `parts`: 0 train, 1 validation, 2 test."""
    staging = path.with_name(f".{path.name}.partial")
    staging.mkdir(parents=True)
    write_dataset(
        staging,
        [images],
        Layout(len(images), images.shape[1], images.shape[3], len(images)),
        classes=classes,
        labels=labels,
        parts=parts,
        names=[f"{number}.png" for number in range(len(images))],
        digests=np.stack([np.frombuffer(hashlib.sha256(image.tobytes()).digest(), np.uint8) for image in images]),
    )
    manifest = Manifest("dataset", "dataset", 1, {"name": path.name}, {}, artifacts.describe_files(staging))
    return artifacts.publish(staging, path, manifest)
