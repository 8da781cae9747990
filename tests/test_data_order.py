"""Splits and orders: pure functions, checked by what they promise and against counter-based numbers from torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipestill import counter, philox
from pipestill.data import order
from pipestill.data.split import stratified


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


def test_no_image_has_no_part() -> None:
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
