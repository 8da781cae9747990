"""Classifier-free guidance (Ho & Salimans 2022), one rule for every model."""

from __future__ import annotations

import torch
from torch import Tensor

from pipestill.diffusion.conditions import Condition
from pipestill.diffusion.denoiser import Denoise


def guided(denoise: Denoise, weight: float) -> Denoise:
    """uncond + w·(cond - uncond); w = 1 is no guidance and costs one branch, any other w costs two, in one batch.

    Raises ValueError, at the first call, where the condition has no null form.
    """
    if weight == 1:
        return denoise

    def both(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        doubled = condition.cat(condition.null())
        conditional, unconditional = denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), doubled).chunk(2)
        return unconditional + weight * (conditional - unconditional)

    return both


def branches(weight: float) -> int:
    """Network calls an image that one guided denoising costs."""
    return 1 if weight == 1 else 2
