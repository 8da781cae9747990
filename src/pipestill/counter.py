"""Random numbers that belong to items: functions of (seed, purpose, item, draw), never of a process or a batch.

Philox4x32-10 (Salmon et al. 2011, 'Parallel random numbers: as easy as 1, 2, 3') in torch integer arithmetic: the
same bits for any batch, order, device and world size. Pure functions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten Philox rounds on four int64 tensors that hold uint32 words; returns four such tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _key(seed: int, purpose: str) -> tuple[int, int]:
    word = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(word[:4], "little"), int.from_bytes(word[4:8], "little")


def words(seed: int, purpose: str, items: Tensor, count: int, draw: int = 0) -> Tensor:
    """`count` uniform uint32 words for each item, as int64 [len(items), count].

    `items` are non-negative int64 indices below 2**64; `draw` (below 2**32) tells apart several draws for one item.
    """
    blocks = -(-count // 4)
    block = torch.arange(blocks, device=items.device, dtype=torch.int64)
    shape = (items.numel(), blocks)
    item = items.to(torch.int64)
    counter = (
        block.expand(shape),
        torch.full(shape, draw & _MASK, dtype=torch.int64, device=items.device),
        (item & _MASK)[:, None].expand(shape),
        ((item >> 32) & _MASK)[:, None].expand(shape),
    )
    out = torch.stack(philox(counter, _key(seed, purpose)), dim=-1)
    return out.reshape(items.numel(), 4 * blocks)[:, :count]


def uniform(seed: int, purpose: str, items: Tensor, shape: Sequence[int] = (), draw: int = 0) -> Tensor:
    """Uniform float64 in (0, 1), [len(items), *shape], 32 random bits each."""
    out = words(seed, purpose, items, math.prod(shape), draw).to(torch.float64)
    return ((out + 0.5) / 2**32).reshape(items.numel(), *shape)


def integers(seed: int, purpose: str, items: Tensor, high: int, shape: Sequence[int] = (), draw: int = 0) -> Tensor:
    """Uniform int64 in [0, high), [len(items), *shape]; `high` far below 2**32."""
    out = words(seed, purpose, items, math.prod(shape), draw)
    return ((out * high) >> 32).reshape(items.numel(), *shape)


def normal(seed: int, purpose: str, items: Tensor, shape: Sequence[int] = (), draw: int = 0) -> Tensor:
    """Standard normal float32, [len(items), *shape], by Box and Muller in float64.

    float64 keeps the rounding to float32 free of how a kernel splits its work into vectors.
    """
    count = math.prod(shape)
    pairs = -(-count // 2)
    out = words(seed, purpose, items, 2 * pairs, draw).to(torch.float64)
    u, v = (out[:, :pairs] + 0.5) / 2**32, (out[:, pairs:] + 0.5) / 2**32
    radius, angle = torch.sqrt(-2.0 * torch.log(u)), (2.0 * math.pi) * v
    both = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return both[:, :count].to(torch.float32).reshape(items.numel(), *shape)
