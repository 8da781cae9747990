"""Images that occur twice: exactly, by the digest of their stored pixels, and nearly, by difference hashes.

Both see images as they are stored, after crop and resize. Pure functions; the search for near ones shows a bar.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipestill.progress import Bar

MOST_COMPARISONS = 300_000_000  # of two hashes; reached only where bits are many or a million images look alike
MOST_KEPT = 2_000_000  # pairs kept for listing


def exact_groups(digests: NDArray[np.uint8]) -> list[NDArray[np.int64]]:
    """Groups of indices with equal digests [N, 32], each sorted, in order of their first index."""
    if not len(digests):
        return []
    words = np.ascontiguousarray(digests).view(np.uint64)
    order = np.lexsort(words.T)  # stable: equal digests keep the order of their indices
    change = np.flatnonzero((words[order][1:] != words[order][:-1]).any(axis=1)) + 1
    starts, ends = np.array([0, *change]), np.array([*change, len(order)])
    repeated = np.flatnonzero(ends - starts > 1)
    groups = [order[starts[at] : ends[at]] for at in repeated]
    return sorted(groups, key=lambda group: int(group[0]))


def first_of(digests: NDArray[np.uint8]) -> NDArray[np.int64]:
    """For each image [N] the first one with the same digest, itself if there is no earlier one."""
    first = np.arange(len(digests))
    for group in exact_groups(digests):
        first[group] = group[0]
    return first


@dataclass(frozen=True)
class NearPairs:
    """How many pairs are near, how many of those lie in different parts, and the nearest as (first, second, bits).

    `groups` int64 [N] gives images the same number if a chain of near pairs connects them.
    """

    count: int
    across_parts: int
    nearest: list[tuple[int, int, int]]
    groups: NDArray[np.int64]
    complete: bool  # False where the search stopped at MOST_COMPARISONS


class _Components:
    """Connected components of a graph whose edges come in batches."""

    def __init__(self, count: int) -> None:
        self._of = np.arange(count)
        self._edges: list[NDArray[np.int64]] = []
        self._waiting = 0

    def join(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
        if len(a):
            self._edges.append(np.stack([a, b]))
            self._waiting += len(a)
        if self._waiting > MOST_KEPT:
            self.of()

    def of(self) -> NDArray[np.int64]:
        """The component of each node."""
        if self._edges:
            from scipy.sparse import coo_array
            from scipy.sparse.csgraph import connected_components

            a, b = self._of[np.concatenate(self._edges, axis=1)]
            shape = (len(self._of),) * 2
            _, joined = connected_components(coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape), directed=False)
            self._of, self._edges, self._waiting = joined[self._of].astype(np.int64), [], 0
        return self._of


def near_pairs(hashes: NDArray[np.uint64], parts: NDArray[np.uint8], *, bits: int, listed: int = 100) -> NearPairs:
    """Pairs of 64-bit hashes [N] at most `bits` apart (Hamming).

    By the pigeonhole principle such a pair agrees in one of bits + 1 bands, so only images that share a band are
    compared: N log N for few bits, where most of N² pairs share none. Equal hashes are counted, not compared.
    """
    unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    in_part = np.zeros((len(unique), 3), dtype=np.int64)
    np.add.at(in_part, (inverse, parts), 1)
    images = in_part.sum(axis=1)
    count = int((images * (images - 1) // 2).sum())
    across = count - int((in_part * (in_part - 1) // 2).sum())
    kept = [_twins(hashes, first, inverse, images)]
    held = len(kept[0])
    components = _Components(len(unique))

    edges = [64 * band // (bits + 1) for band in range(bits + 2)]
    bands = [(unique >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1) for low, high in pairwise(edges)]
    comparisons = sum(map(_alike, bands)) if bits else 0
    bar = Bar("hashes compared", min(comparisons, MOST_COMPARISONS), unit="pair", show=comparisons > 0)
    compared = 0
    for number, band in enumerate(bands):
        if bits == 0:
            break  # one band, the whole hash: equal hashes are all there is
        order = np.argsort(band, kind="stable")
        left = np.arange(len(order))
        for step in range(1, len(order)):
            left = left[left + step < len(order)]
            left = left[band[order[left]] == band[order[left + step]]]
            compared += len(left)
            bar.advance(len(left))
            if not len(left) or compared > MOST_COMPARISONS:
                break
            a, b = order[left], order[left + step]
            distance = np.bitwise_count(unique[a] ^ unique[b])
            near = distance <= bits
            for earlier in bands[:number]:
                near &= earlier[a] != earlier[b]  # that band has counted the pair
            a, b, distance = a[near], b[near], distance[near]
            components.join(a, b)
            pairs = images[a] * images[b]
            count += int(pairs.sum())
            across += int((pairs - (in_part[a] * in_part[b]).sum(axis=1)).sum())
            if len(a) and held < MOST_KEPT:
                kept.append(_triples(first[a], first[b], distance))
                held += len(a)
    bar.close()
    found = np.concatenate(kept)
    found = found[np.lexsort((found[:, 1], found[:, 0], found[:, 2]))][:listed]
    nearest = [(int(i), int(j), int(d)) for i, j, d in found]
    return NearPairs(count, across, nearest, components.of()[inverse], compared <= MOST_COMPARISONS)


def _alike(band: NDArray[np.uint64]) -> int:
    """How many pairs of hashes agree in a band."""
    _, counts = np.unique(band, return_counts=True)
    return int((counts * (counts - 1) // 2).sum())


def _twins(
    hashes: NDArray[np.uint64], first: NDArray[np.int64], inverse: NDArray[np.int64], images: NDArray[np.int64]
) -> NDArray[np.int64]:
    """For each hash that several images share, its first two images, at distance 0."""
    others = np.setdiff1d(np.arange(len(hashes)), first)
    _, at = np.unique(inverse[others], return_index=True)
    second = others[at]
    return _triples(first[images > 1], second, np.zeros(len(second), dtype=np.int64))


def _triples(a: NDArray[np.int64], b: NDArray[np.int64], distance: NDArray[np.integer]) -> NDArray[np.int64]:
    return np.stack([np.minimum(a, b), np.maximum(a, b), distance.astype(np.int64)], axis=1)
