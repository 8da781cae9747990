"""The pictures of items: item i of seed s is a function of model, sampler, sigmas, condition, s and i alone.

Pure functions of tensors. The bits of an item also depend on the batch's size, so callers keep that fixed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipestill import counter
from pipestill.diffusion.conditions import Condition
from pipestill.diffusion.denoiser import Denoise
from pipestill.diffusion.samplers import Sample, start


def latents(seed: int, items: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal start noise of items [N] int64: float32 [N, *shape] on the device of `items`."""
    return counter.normal(seed, "latent", items, shape)


@torch.no_grad()
def sample_items(
    denoise: Denoise,
    *,
    sampler: Sample,
    sigmas: Tensor,
    condition: Condition,
    seed: int,
    items: Tensor,
    shape: tuple[int, int, int],
    device: torch.device,
) -> Tensor:
    """Samples items [N] int64 of a seed: x0 float32 [N, C, H, W], clamped by nobody.

    `condition` (length N) lies on `device`, and `sigmas` end in 0.
    """
    items = items.to(device)

    def step_noise(step: int) -> Tensor:
        return counter.normal(seed, "step", items, shape, draw=step)

    x = start(latents(seed, items, shape), float(sigmas[0]))
    return sampler(denoise, x, sigmas, condition, step_noise)


def to_uint8(x0: Tensor) -> Tensor:
    """x0 in [-1, 1] to uint8 of the same shape: round(127.5·x0 + 127.5), clipped to 0..255."""
    return x0.mul(127.5).add_(127.5).round_().clamp_(0, 255).to(torch.uint8)
