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
from pipestill.data.split import stratified
from pipestill.data.store import Layout, write_dataset
from pipestill.sampling.store import write_samples

CLASSES = ("across", "down", "aslant")


def drawn(
    count: int, *, seed: int = 0, side: int = 8, channels: int = 1
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Noisy waves in three directions by class: uint8 [count, side, side, channels], classes 0, 1, 2, 0, … int64."""
    rng = np.random.RandomState(seed)
    labels = np.arange(count) % len(CLASSES)
    row, column = np.mgrid[:side, :side] * (2 * np.pi / 5)
    along = np.stack([row, column, (row + column) / np.sqrt(2)])[labels]
    phase = (np.arange(count)[:, None, None] // len(CLASSES) * 0.618 + rng.rand()) % 1  # evenly over the circle
    waves = 128 + 70 * np.sin(along + 2 * np.pi * phase)
    noisy = waves[..., None] + 8 * rng.randn(count, side, side, channels)
    return np.clip(noisy, 0, 255).astype(np.uint8), labels.astype(np.int64)


def make_samples(
    path: Path,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    classes: Sequence[str] = CLASSES,
    seeds: Sequence[int] = (0,),
    plan: str = "balanced",
) -> Artifact:
    """Publishes images uint8 [len(seeds) * n, H, W, C] with their labels as a samples artefact of `seeds`."""
    staging = path.with_name(f".{path.name}.partial")
    staging.mkdir(parents=True)
    index: dict[str, Any] = {"seeds": list(seeds), "images_per_seed": len(images) // len(seeds)}
    index |= {
        "plan": plan,
        "classes": list(classes),
        "evaluations": 20,
        "guidance": 1.5,
        "sampler": "euler",
        "steps": 10,
    }
    write_samples(staging, [images], labels=labels, shape=images.shape[1:], index=index)
    manifest = Manifest("samples", "sample", 1, {"seeds": list(seeds)}, {}, artifacts.describe_files(staging))
    return artifacts.publish(staging, path, manifest)


def publish_dataset(
    path: Path, images: NDArray[np.uint8], labels: NDArray[np.int64], parts: NDArray[np.uint8], classes: Sequence[str]
) -> Path:
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
    manifest = Manifest("dataset", "dataset", 1, {}, {}, artifacts.describe_files(staging))
    return artifacts.publish(staging, path, manifest).path


def make_dataset(
    path: Path,
    count: int = 240,
    *,
    classes: Sequence[str] = CLASSES,
    channels: int = 1,
    side: int = 8,
    validation: float = 0.15,
    test: float = 0.30,
) -> Path:
    """Publishes `drawn` images as a dataset artefact; classes () leaves the labels out."""
    images, labels = drawn(count, seed=100, side=side, channels=channels)
    if not classes:
        labels = np.full_like(labels, -1)
    parts = stratified(labels, validation=validation, test=test, seed=0)
    return publish_dataset(path, images, labels, parts, classes)
