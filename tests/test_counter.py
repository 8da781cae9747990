"""The counter-based generator: Random123's known answers, items apart from batches, and the distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipestill import counter, philox

ALL_ONES = 0xFFFFFFFF
KNOWN = [  # counter, key, result: Random123's kat_vectors for philox4x32-10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("start", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers(
    start: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox.philox(tuple(torch.tensor([word]) for word in start), key)  # type: ignore[arg-type]
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize(("start", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers_in_numpy_too(
    start: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox.philox(tuple(np.array([word], dtype=np.uint64) for word in start), key)  # type: ignore[arg-type]
    assert tuple(int(word[0]) for word in words) == expected


def test_numpys_keys_are_torchs_first_two_words() -> None:
    items = np.array([0, 1, 77, 2**40 + 3])
    first, second = counter.words(9, "order", torch.from_numpy(items), 2, draw=4).unbind(dim=1)
    expected = [int(high) << 32 | int(low) for high, low in zip(first, second, strict=True)]
    assert philox.keys64(9, "order", items, draw=4).tolist() == expected


def _plain_philox(start: list[int], key: list[int]) -> list[int]:
    """Salmon et al. 2011, section 3.3, in Python's integers."""
    for _ in range(10):
        first, second = 0xD2511F53 * start[0], 0xCD9E8D57 * start[2]
        start = [second >> 32 ^ start[1] ^ key[0], second & ALL_ONES, first >> 32 ^ start[3] ^ key[1], first & ALL_ONES]
        key = [(key[0] + 0x9E3779B9) & ALL_ONES, (key[1] + 0xBB67AE85) & ALL_ONES]
    return start


@settings(max_examples=50, deadline=None)
@given(
    start=st.lists(st.integers(0, ALL_ONES), min_size=4, max_size=4),
    key=st.lists(st.integers(0, ALL_ONES), min_size=2, max_size=2),
)
def test_philox_in_signed_tensors_is_philox_in_plain_integers(start: list[int], key: list[int]) -> None:
    words = philox.philox(tuple(torch.tensor([word]) for word in start), (key[0], key[1]))  # type: ignore[arg-type]
    assert [int(word) for word in words] == _plain_philox(start, key)


def test_words_place_item_draw_and_block_in_the_counter() -> None:
    item, draw = 2**33 + 5, 7
    key = philox.key(3, "purpose")
    expected = [word for block in (0, 1) for word in _plain_philox([block, draw, 5, 2], list(key))]
    assert counter.words(3, "purpose", torch.tensor([item]), 6, draw=draw)[0].tolist() == expected[:6]


def test_an_item_does_not_depend_on_its_batch() -> None:
    items = torch.tensor([4, 900, 17, 2**40, 0])
    whole = counter.normal(1, "latent", items, (3, 5, 7))
    for position, item in enumerate(items):
        assert torch.equal(counter.normal(1, "latent", item[None], (3, 5, 7))[0], whole[position])
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.equal(counter.normal(1, "latent", items[order], (3, 5, 7)), whole[order])


def test_a_longer_draw_begins_as_the_shorter_one_does() -> None:
    items = torch.arange(3)
    assert torch.equal(counter.words(0, "a", items, 11)[:, :5], counter.words(0, "a", items, 5))


def test_seed_purpose_item_and_draw_all_tell_apart() -> None:
    item = torch.tensor([1])
    draws = [
        counter.words(0, "a", item, 4),
        counter.words(1, "a", item, 4),
        counter.words(0, "b", item, 4),
        counter.words(0, "a", item + 1, 4),
        counter.words(0, "a", item, 4, draw=1),
    ]
    words = torch.cat(draws).flatten()
    assert len(set(words.tolist())) == 20


def test_torchs_own_generator_is_neither_read_nor_moved() -> None:
    before = torch.get_rng_state()
    first = counter.normal(0, "a", torch.arange(4), (8,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(counter.normal(0, "a", torch.arange(4), (8,)), first)


def test_uniform_has_the_moments_and_the_distribution_of_a_uniform() -> None:
    draws = counter.uniform(5, "u", torch.arange(1000), (200,)).flatten()
    assert draws.dtype == torch.float64
    assert draws.min() > 0
    assert draws.max() < 1
    assert _kolmogorov(draws, lambda x: x) < 1.95  # 0.1% of uniform samples lie above
    assert draws.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / 200_000))


def test_normal_has_the_moments_and_the_distribution_of_a_normal() -> None:
    draws = counter.normal(5, "n", torch.arange(1000), (200,)).flatten().double()
    count = draws.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert draws.pow(power).mean().item() == pytest.approx(moment, abs=4 * math.sqrt(variance / count))
    assert _kolmogorov(draws, lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2)))) < 1.95
    assert draws.abs().max() > 4  # the tails are there: 4.8 is expected of 200,000
    halves = counter.normal(5, "n", torch.arange(1000), (200,))  # cosines in one half, sines in the other
    assert abs((halves[:, :100] * halves[:, 100:]).mean().item()) < 4 / math.sqrt(100_000)


def test_neighbouring_items_are_uncorrelated() -> None:
    draws = counter.normal(0, "n", torch.arange(2001), (50,)).double()
    assert abs((draws[1:] * draws[:-1]).mean().item()) < 4 / math.sqrt(100_000)


def test_integers_cover_their_range_evenly() -> None:
    draws = counter.integers(2, "i", torch.arange(7000), 7, (10,)).flatten()
    counts = torch.bincount(draws, minlength=7).double()
    assert counts.numel() == 7
    assert (((counts - 10_000) ** 2) / 10_000).sum().item() < 22.5  # chi-squared of 6 degrees, 0.1%


def test_an_odd_number_of_normals() -> None:
    assert counter.normal(0, "a", torch.arange(2), (3, 3)).shape == (2, 3, 3)
    assert counter.normal(0, "a", torch.arange(2)).shape == (2,)


def _kolmogorov(draws: torch.Tensor, distribution) -> float:  # type: ignore[no-untyped-def]
    """Kolmogorov's statistic sqrt(n)·sup |F_n - F|."""
    ordered = draws.sort().values
    count = ordered.numel()
    cumulative = distribution(ordered)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    return math.sqrt(count) * max((steps[1:] - cumulative).max().item(), (cumulative - steps[:-1]).max().item())
