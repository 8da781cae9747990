"""Noise levels as float64 lists: those that a sampler visits, decreasing to 0, and those that a training draws from."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Spacing = Literal["trailing", "leading", "linspace"]  # as Diffusers' schedulers call them


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


def karras_ladder(count: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """`count` Karras sigmas, ascending, float64: the noise levels that DMD2 draws from (1,000 as published)."""
    if count == 1:
        return torch.tensor([sigma_min], dtype=torch.float64)
    ramp = torch.linspace(0, 1, count, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    ladder: Tensor = (low + ramp * (high - low)) ** rho
    return ladder


def spaced_steps(steps: int, total: int, spacing: Spacing) -> Tensor:
    """`steps` of the steps 0 … total-1, decreasing, int64: Diffusers' `timestep_spacing` (Lin et al. 2023, table 2).

    `trailing` begins with the last step, `leading` ends with step 0, `linspace` does both. Raises ValueError.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"{steps} steps of a schedule of {total}")
    if spacing == "leading":
        return torch.arange(steps - 1, -1, -1) * (total // steps)
    if spacing == "trailing":
        return (torch.arange(steps, 0, -1, dtype=torch.float64) * (total / steps)).round().long() - 1
    return torch.linspace(total - 1, 0, steps, dtype=torch.float64).round().long()


def vp_sigmas(betas: Tensor) -> Tensor:
    """sqrt((1 - abar_t) / abar_t) of a schedule's betas [T]: ascending, float64; infinite where abar is 0."""
    abar = (1 - betas.double()).cumprod(0)
    return ((1 - abar) / abar).sqrt()


def linear_alpha_sigmas(total: int = 1000, epsilon: float = 1e-3) -> Tensor:
    """The noise levels of abar_t = max(1 - t/total, epsilon), which no DDPM is trained with: [total] float64.

    A 10-step formula in use takes it for DDIM with networks that are trained on another schedule, which then see
    images of another noise level than their t says. It stays here under its own name, to be compared with.
    """
    abar = (1 - torch.arange(total, dtype=torch.float64) / total).clamp(min=epsilon)
    return ((1 - abar) / abar).sqrt()
