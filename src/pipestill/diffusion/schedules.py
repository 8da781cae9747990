"""Noise schedules: decreasing lists of sigmas, float64, ending in 0."""

from __future__ import annotations

import torch
from torch import Tensor


def karras(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """`steps` sigmas from sigma_max to sigma_min and a final 0 (Karras et al. 2022, eq. 5): [steps + 1] float64.

    One step is [sigma_max, 0]. Raises ValueError unless 0 < sigma_min <= sigma_max and steps >= 1.
    """
    if steps < 1 or not 0 < sigma_min <= sigma_max:
        raise ValueError(f"no schedule of {steps} steps from {sigma_max} to {sigma_min}")
    ramp = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    sigmas[0] = sigma_max
    return torch.cat([sigmas, sigmas.new_zeros(1)])
