"""Splits and orders: pure functions, checked by what they promise and against counter-based numbers from torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipestill import counter, philox
from pipestill.data import order
from pipestill.data.split import stratified, together


def test_numpy_and_torch_draw_the_same_words() -> None:
    items = np.array([0, 1, 5, 2**40 + 3])
    words = counter.words(7, "order", torch.from_numpy(items), 2, draw=3).numpy().astype(np.uint64)
    assert (philox.keys64(7, "order", items, draw=3) == (words[:, 0] << np.uint64(32) | words[:, 1])).all()


def test_philox_known_answers() -> None:
    """The reference implementation's known answers (Random123, kat_vectors, philox4x32 10)."""
    ones = 0xFFFFFFFF
    pi = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    for words, key, wanted in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (*pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        c0, c1, c2, c3 = (np.array([word], dtype=np.uint64) for word in words)
        assert tuple(int(word[0]) for word in philox.philox((c0, c1, c2, c3), key)) == wanted


@pytest.mark.parametrize("epoch", [0, 1])
def test_permutations_hold_every_image_and_differ_between_epochs_and_seeds(epoch: int) -> None:
    here = order.permutation(1000, 0, epoch)
    assert sorted(here.tolist()) == list(range(1000))
    assert (here != order.permutation(1000, 0, epoch + 1)).mean() > 0.99
    assert (here != order.permutation(1000, 1, epoch)).mean() > 0.99


def test_ranks_share_a_step_whatever_their_number() -> None:
    whole = order.positions(5, batch=12)
    assert whole.tolist() == list(range(60, 72))
    for size in (2, 3, 4):
        shares = [order.positions(5, batch=12, rank=rank, size=size) for rank in range(size)]
        assert np.concatenate(shares).tolist() == whole.tolist()


def test_a_step_that_spans_two_epochs() -> None:
    stream = np.arange(8, 16)
    wanted = [*order.permutation(10, 3, 0)[8:], *order.permutation(10, 3, 1)[:6]]
    assert order.images_at(stream, count=10, seed=3).tolist() == wanted


@pytest.mark.parametrize(("validation", "test"), [(0.15, 0.3), (0.0, 0.5), (0.33, 0.33), (0.0, 0.0)])
def test_stratified_split_keeps_its_shares(validation: float, test: float) -> None:
    labels = np.random.default_rng(0).choice(12, 2000, p=np.arange(1, 13) / 78)
    parts = stratified(labels, validation=validation, test=test, seed=0)
    assert abs((parts == 2).sum() - 2000 * test) <= 1
    assert abs((parts == 1).sum() - 2000 * validation) <= 1
    for label in range(12):
        members = parts[labels == label]
        assert abs((members == 2).sum() - len(members) * test) <= 2
        assert abs((members == 1).sum() - len(members) * validation) <= 2
    assert (parts == stratified(labels, validation=validation, test=test, seed=0)).all()
    if test:
        assert (parts != stratified(labels, validation=validation, test=test, seed=1)).mean() > 0.2


def test_small_classes_keep_an_image_to_train_on() -> None:
    labels = np.repeat(np.arange(30), [1, 2, 3] * 10)
    parts = stratified(labels, validation=0.2, test=0.7, seed=0)
    assert set(labels[parts == 0]) == set(range(30))


def some_groups(labels: np.ndarray, sizes: list[int], seed: int) -> np.ndarray:
    """Groups of the given sizes, most of them of images of one class."""
    generator = np.random.default_rng(seed)
    groups = np.arange(len(labels))
    free = set(groups.tolist())
    for size in sizes:
        first = int(generator.choice(sorted(free)))
        own = [at for at in sorted(free) if labels[at] == labels[first] or generator.random() < 0.02]
        chosen = generator.choice(own, min(size, len(own)), replace=False)
        groups[chosen] = len(labels) + first
        free -= set(chosen.tolist())
    return groups


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together_and_the_parts_keep_their_sizes(seed: int) -> None:
    labels = np.random.default_rng(seed).choice(6, 900, p=np.arange(1, 7) / 21)
    options = {"validation": 0.15, "test": 0.3, "seed": seed}
    alone = stratified(labels, **options)
    groups = some_groups(labels, [9, 7, 5] + [2] * 60, seed)
    parts = together(labels, groups, **options)
    for group in np.unique(groups):
        assert len(set(parts[groups == group])) == 1
    for label in range(6):  # each class has as many images in each part as without groups
        assert np.bincount(parts[labels == label], minlength=3).tolist() == np.bincount(alone[labels == label]).tolist()
    assert (parts == together(labels, groups, **options)).all()
    assert (parts == together(labels, groups * 7 + 3, **options)).all(), "whatever the groups are called"
    if seed:
        assert (parts != together(labels, groups, **options | {"seed": 0})).mean() > 0.2
    assert (together(labels, np.arange(900), **options) == alone).all()


def test_groups_go_to_each_part_as_often_as_images_do() -> None:
    labels = np.zeros(400, dtype=np.int64)
    groups = np.arange(400) // 2  # 200 pairs
    found = np.concatenate(
        [together(labels, groups, validation=0.15, test=0.3, seed=seed)[[0, 100, 399]] for seed in range(200)]
    )
    shares = np.bincount(found, minlength=3) / 600
    error = 4 * np.sqrt(0.25 / 600)  # four standard deviations of a share at most
    assert np.abs(shares - [0.55, 0.15, 0.3]).max() < error


def test_groups_that_are_too_large_do_the_least_harm() -> None:
    half = np.zeros(10, dtype=np.int64)
    groups = np.array([0] * 6 + [1, 2, 3, 4])  # six of ten, and five are to be trained on
    parts = together(half, groups, validation=0.2, test=0.3, seed=0)
    assert parts[:6].tolist() == [0] * 6
    assert np.bincount(parts).tolist() == [6, 2, 2], "the other four as 2 : 3 would have them, rounded"
    everything = together(half, np.zeros(10, dtype=np.int64), validation=0.2, test=0.3, seed=0)
    assert everything.tolist() == [0] * 10


@pytest.mark.parametrize("seed", range(20))
def test_every_class_keeps_an_image_to_train_on_whatever_the_groups(seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 8, 60)
    groups = generator.integers(0, 15, 60)
    parts = together(labels, groups, validation=0.3, test=0.6, seed=seed)
    assert set(labels[parts == 0]) == set(labels)
    for group in range(15):
        assert len(set(parts[groups == group])) <= 1


def test_no_image_has_no_part() -> None:
    nothing = np.empty(0, dtype=np.int64)
    assert len(together(nothing, nothing, validation=0.1, test=0.1, seed=0)) == 0
    assert len(stratified(np.empty(0, dtype=np.int64), validation=0.1, test=0.1, seed=0)) == 0


def test_balanced_batches_have_every_class_equally_often_and_every_image_of_a_class() -> None:
    labels = np.array([4] * 3 + [7] * 1 + [9] * 5)
    classes = order.members(labels)
    assert [own.tolist() for own in classes] == [[0, 1, 2], [3], [4, 5, 6, 7, 8]]
    stream = np.arange(3 * 30)
    chosen = order.balanced_at(stream, classes=classes, seed=5)
    turns = labels[chosen].reshape(30, 3)
    assert (np.sort(turns, axis=1) == [4, 7, 9]).all()
    assert len({tuple(turn) for turn in turns.tolist()}) == 6, "in every order of the three"
    for own in classes:
        drawn = chosen[np.isin(chosen, own)].reshape(-1, len(own))
        assert (np.sort(drawn, axis=1) == own).all(), "all images of a class before one comes again"
    orders = chosen[labels[chosen] == 9].reshape(-1, 5)
    assert len({tuple(each) for each in orders.tolist()}) == len(orders), "in a new order each time"
    assert (chosen != order.balanced_at(stream, classes=classes, seed=6)).any()
    parts = [order.balanced_at(part, classes=classes, seed=5) for part in np.array_split(stream, 7)]
    assert (np.concatenate(parts) == chosen).all(), "whoever asks for it"
