"""Philox4x32-10 (Salmon et al. 2011, 'Parallel random numbers: as easy as 1, 2, 3') on arrays of any library.

`counter` draws from it with torch, splits and orders with NumPy, so that what needs no torch need not import it; both
give the same words. Pure functions.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Ten Philox rounds on four 64-bit integer arrays or tensors that hold uint32 words; returns four such."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & MASK) ^ c1 ^ k0,
            p1 & MASK,
            ((p0 >> 32) & MASK) ^ c3 ^ k1,
            p0 & MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & MASK, (k1 + _WEYL[1]) & MASK
    return c0, c1, c2, c3


def key(seed: int, purpose: str) -> tuple[int, int]:
    """The key of a stream: two uint32 words."""
    word = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(word[:4], "little"), int.from_bytes(word[4:8], "little")


def keys64(seed: int, purpose: str, items: NDArray[np.int64], draw: int = 0) -> NDArray[np.uint64]:
    """A uniform 64-bit number for each item: the first two words of `counter.words`, first word high."""
    item = items.astype(np.uint64)
    zero = np.zeros_like(item)
    first, second, _, _ = philox((zero, zero + np.uint64(draw & MASK), item & MASK, item >> 32), key(seed, purpose))
    joined: NDArray[np.uint64] = first << 32 | second
    return joined
