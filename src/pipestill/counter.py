"""Random numbers that belong to items: functions of (seed, purpose, item, draw), never of a process or a batch.

Philox4x32-10 in torch's integer arithmetic: the same bits for any batch, order, device and world size. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipestill.philox import MASK, key, philox


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
        torch.full(shape, draw & MASK, dtype=torch.int64, device=items.device),
        (item & MASK)[:, None].expand(shape),
        ((item >> 32) & MASK)[:, None].expand(shape),
    )
    out = torch.stack(philox(counter, key(seed, purpose)), dim=-1)
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
