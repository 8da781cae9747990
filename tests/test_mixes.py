"""Class mixes: labels by item, apportionment, weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipestill import mixes

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)


@given(counts=COUNTS, length=st.integers(1, 100))
def test_every_prefix_of_a_sequence_is_in_the_mix(counts: list[int], length: int) -> None:
    mix = np.array(counts)
    labels = mixes.sequence(mix, length)
    assert len(labels) == length
    assert (mixes.sequence(mix, length + 17)[:length] == labels).all()  # an item's class is its own affair
    got = np.bincount(labels, minlength=len(mix))
    exact = length * mix / mix.sum()
    assert (got[mix == 0] == 0).all()
    assert (np.abs(got - exact) < 2).all()
    if length == mix.sum():
        assert (got == mix).all()


def test_sequences_of_known_mixes() -> None:
    assert mixes.sequence(np.array([1, 1, 1]), 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert mixes.sequence(np.array([0, 5, 5]), 4).tolist() == [1, 2, 1, 2]
    assert mixes.sequence(np.array([4, 2, 1]), 7).tolist() == [0, 1, 0, 2, 0, 1, 0]


@given(counts=COUNTS, total=st.integers(0, 200))
def test_apportionment_is_within_one_image_of_each_share(counts: list[int], total: int) -> None:
    mix = np.array(counts)
    shares = mixes.apportioned(mix, total)
    assert shares.sum() == total
    assert (np.abs(shares - total * mix / mix.sum()) < 1).all()


def test_a_plan_has_no_class_without_images() -> None:
    images = np.array([0, 30, 10])
    assert mixes.of_plan("balanced", images).tolist() == [0, 1, 1]
    assert mixes.of_plan("data", images).tolist() == [0, 30, 10]


def test_weights_bring_images_into_a_mix() -> None:
    labels = np.repeat([0, 1, 2], [10, 30, 60])
    weights = mixes.weights(labels, np.array([1, 1, 2]))
    assert weights is not None
    assert [weights[labels == index].sum() for index in range(3)] == pytest.approx([0.25, 0.25, 0.5])
    assert [np.ptp(weights[labels == index]) for index in range(3)] == [0, 0, 0]
    left_out = mixes.weights(labels[labels < 2], np.array([1, 1, 2]))  # nothing of class 2
    assert left_out is not None
    assert left_out[:10].sum() == pytest.approx(0.5)


def test_images_that_whole_numbers_cannot_bring_nearer_need_no_weights() -> None:
    assert mixes.weights(np.repeat([0, 1, 2], [53, 54, 55]), np.array([1, 1, 1])) is None
    assert mixes.weights(np.repeat([0, 1, 2], [50, 54, 58]), np.array([1, 1, 1])) is not None
    assert mixes.weights(np.full(9, -1), np.array([1, 1, 1])) is None


@pytest.mark.parametrize(
    ("images", "in_the_mix"),
    [
        *(([6, 4, 2], False), ([4, 5, 7], False), ([3, 7], False), ([4, 5, 6], False), ([98, 104, 98], False)),
        *(([5, 5, 6], True), ([1, 2], True), ([53, 54, 55], True), ([0, 1, 1], True), ([98, 100, 102], True)),
        *(([28, 30, 32], False), ([39, 41], True), ([1_000_000, 1_000_003], True), ([1_000_000, 1_000_006], False)),
    ],
)
def test_images_are_in_a_mix_as_far_as_whole_images_and_a_split_allow(images: list[int], in_the_mix: bool) -> None:
    """Less than one image from the share of each class, or up to two images and 5% of it."""
    assert mixes.agree(np.array(images), np.ones(len(images))) == in_the_mix
