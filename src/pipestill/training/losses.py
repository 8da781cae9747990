"""The denoising loss (Karras et al. 2022, eq. 2 and table 1): a pure function."""

from __future__ import annotations

from torch import Tensor

from pipestill.diffusion.conditions import Condition
from pipestill.diffusion.denoiser import Denoise, noised, per_sample


def denoising_loss(
    denoise: Denoise, x0: Tensor, sigma: Tensor, eps: Tensor, condition: Condition, weight: Tensor
) -> Tensor:
    """mean over samples and pixels of weight·(D(x0 + sigma·eps; sigma) - x0)²; a scalar.

    x0, eps [N, C, H, W] with x0 in [-1, 1]; sigma, weight [N].
    """
    error = denoise(noised(x0, sigma, eps), sigma, condition) - x0
    return (per_sample(weight, x0) * error.square()).mean()
