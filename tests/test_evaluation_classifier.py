"""The judge: it learns, it is the same bits each time, it takes any resolution and colour."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipestill.config import ClassifierParams
from pipestill.evaluation import classifier

SMALL = ClassifierParams(channels=(8, 16), features=12, iterations=60, batch=32)


def stripes(count: int, channels: int, side: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy pictures of two classes: vertical and horizontal stripes of random phase."""
    rng = np.random.RandomState(seed)
    labels = np.arange(count) % 2
    wave = np.sin(np.arange(side)[None, :] * np.pi / 2 + rng.rand(count, 1) * 2 * np.pi)
    images = np.repeat(wave[:, None, :], side, axis=1)
    images = np.where(labels[:, None, None] == 0, images, images.transpose(0, 2, 1))
    noisy = np.clip(images * 60 + 128 + rng.randn(count, side, side) * 20, 0, 255).astype(np.uint8)
    return torch.from_numpy(np.repeat(noisy[:, None], channels, axis=1)), torch.from_numpy(labels)


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 9), (1, 40), (3, 4)])
def test_it_learns_at_any_size_and_colour(channels: int, side: int) -> None:
    images, labels = stripes(200, channels, side)
    held_images, held_labels = stripes(100, channels, side, seed=1)
    network = classifier.train(SMALL, images, labels, classes=2)
    assert classifier.accuracy(network, held_images, held_labels) > 0.95
    assert classifier.accuracy(network, held_images, 1 - held_labels) < 0.05


def test_the_same_seed_gives_the_same_bits_whatever_the_global_generator() -> None:
    images, labels = stripes(100, 1, 8)
    torch.manual_seed(1)
    first = classifier.train(SMALL, images, labels, classes=2)
    torch.manual_seed(2)
    second = classifier.train(SMALL, images, labels, classes=2)
    other = classifier.train(SMALL.model_copy(update={"seed": 5}), images, labels, classes=2)
    for a, b, c in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_its_penultimate_features_are_an_extractor() -> None:
    images, labels = stripes(100, 1, 8)
    network = classifier.train(SMALL, images, labels, classes=2)
    extractor = classifier.extractor(network)
    features = extractor(images)
    assert (extractor.name, extractor.dimension, features.shape) == ("classifier", 12, (100, 12))
    torch.testing.assert_close(network.last(features), classifier.logits(network, images))


def test_fewer_images_than_a_batch() -> None:
    images, labels = stripes(20, 1, 8)
    network = classifier.train(SMALL, images, labels, classes=2)
    assert classifier.accuracy(network, images, labels) > 0.9
