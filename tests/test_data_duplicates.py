"""Duplicates against brute force over all pairs."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pipestill.data.duplicates import exact_groups, first_of, near_pairs


def clustered(count: int, flips: int, seed: int) -> NDArray[np.uint64]:
    """64-bit hashes around a few centres, so that many are near and some equal."""
    generator = np.random.default_rng(seed)
    hashes = generator.integers(0, 2**64, count // 10, dtype=np.uint64)[generator.integers(0, count // 10, count)]
    for _ in range(flips):
        hashes ^= np.uint64(1) << generator.integers(0, 64, count, dtype=np.uint64)
    return hashes


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 5, 8, 16])
def test_near_pairs_are_those_of_brute_force(bits: int) -> None:
    hashes = np.concatenate([clustered(300, flips, flips) for flips in (0, 1, 3)])
    parts = np.random.default_rng(9).integers(0, 3, len(hashes)).astype(np.uint8)
    distances = np.bitwise_count(hashes[:, None] ^ hashes)
    first, second = np.nonzero(np.triu(distances <= bits, k=1))
    found = near_pairs(hashes, parts, bits=bits, listed=10**6)
    assert found.complete
    assert found.count == len(first)
    assert found.across_parts == (parts[first] != parts[second]).sum()
    assert len(first) > 300
    listed = {(i, j): d for i, j, d in found.nearest}
    assert all(distances[i, j] == d <= bits and i < j for (i, j), d in listed.items())
    # one pair is listed for two hashes, whoever else has them
    wanted = {frozenset((int(hashes[i]), int(hashes[j]))) for i, j in zip(first, second, strict=True)}
    assert {frozenset((int(hashes[i]), int(hashes[j]))) for i, j in listed} == wanted
    assert [d for _, _, d in found.nearest] == sorted(d for _, _, d in found.nearest)


def test_near_pairs_of_many_are_found_fast() -> None:
    """200,000 hashes have 2e10 pairs; bands compare about 30,000 of them."""
    hashes = np.random.default_rng(0).integers(0, 2**64, 200_000, dtype=np.uint64)
    hashes[-1000:] = hashes[:1000] ^ np.uint64(1 << 40)
    found = near_pairs(hashes, np.zeros(len(hashes), dtype=np.uint8), bits=2)
    assert found.complete
    assert found.count == 1000
    assert found.nearest[0] == (0, 199_000, 1)


def test_a_search_that_would_compare_too_much_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipestill.data.duplicates.MOST_COMPARISONS", 1000)
    hashes = np.arange(2000, dtype=np.uint64)
    assert not near_pairs(hashes, np.zeros(2000, dtype=np.uint8), bits=2).complete


def test_the_search_shows_all_its_comparisons(capsys: pytest.CaptureFixture[str]) -> None:
    """Two of the three bands are the same in all 2,000 hashes; where nothing is compared, nothing is said."""
    parts = np.zeros(2000, dtype=np.uint8)
    near_pairs(np.arange(2000, dtype=np.uint64), parts, bits=2)
    assert "hashes compared: 3998000/3998000 (100%)" in capsys.readouterr().err.splitlines()[-1]
    near_pairs(np.arange(2000, dtype=np.uint64), parts, bits=0)
    assert capsys.readouterr().err == ""


def test_no_hash_and_one() -> None:
    for count in (0, 1):
        found = near_pairs(np.zeros(count, dtype=np.uint64), np.zeros(count, dtype=np.uint8), bits=2)
        assert (found.count, found.nearest, found.complete) == (0, [], True)


def test_exact_groups_are_those_of_equal_digests() -> None:
    generator = np.random.default_rng(0)
    digests = generator.integers(0, 256, (40, 32), dtype=np.uint8)[generator.integers(0, 40, 100)]
    by_bytes: dict[bytes, list[int]] = {}
    for index, digest in enumerate(digests):
        by_bytes.setdefault(digest.tobytes(), []).append(index)
    wanted = [group for group in by_bytes.values() if len(group) > 1]
    assert [group.tolist() for group in exact_groups(digests)] == wanted
    assert exact_groups(digests[:0]) == []


@pytest.mark.parametrize("bits", [0, 1, 2, 5])
def test_chains_of_near_pairs_are_groups(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a search that walks from neighbour to neighbour; edges are joined in several batches."""
    monkeypatch.setattr("pipestill.data.duplicates.MOST_KEPT", 50)
    hashes = np.concatenate([clustered(200, flips, flips) for flips in (0, 1, 3)])
    near = np.bitwise_count(hashes[:, None] ^ hashes) <= bits
    wanted = np.full(len(hashes), -1)
    for start in range(len(hashes)):
        reached = [start] if wanted[start] < 0 else []
        for at in reached:
            if wanted[at] < 0:
                wanted[at] = start
                reached += np.flatnonzero(near[at]).tolist()
    groups = near_pairs(hashes, np.zeros(len(hashes), dtype=np.uint8), bits=bits).groups
    assert ((groups[:, None] == groups) == (wanted[:, None] == wanted)).all()
    assert len(np.unique(groups)) < len(hashes)


def test_the_first_image_with_the_same_pixels() -> None:
    digests = np.zeros((6, 32), dtype=np.uint8)
    digests[:, 0] = [5, 3, 5, 7, 3, 5]
    assert first_of(digests).tolist() == [0, 1, 0, 3, 1, 0]
    assert first_of(digests[:0]).tolist() == []
