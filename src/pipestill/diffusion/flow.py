"""Flow matching along the straight path (Lipman et al. 2023; Liu et al. 2023): networks that predict v = eps - x0.

On the path x_t = (1 - t)·x0 + t·eps, t = sigma/(1 + sigma); the network sees x_t = x/(1 + sigma).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipestill.diffusion.conditions import Condition
from pipestill.diffusion.denoiser import Denoiser, per_sample
from pipestill.diffusion.schedules import Spacing

TIMES = 1000.0  # networks see t in [0, 1000], as Diffusers' flow schedulers give it


class Flow(Denoiser):
    """A network that takes (x_t, 1000·t, **condition) and predicts v = eps - x0; x0 = x_t - t·v.

    Its noise reaches t = 1, where sigma is infinite and x_t is eps. `shift` multiplies the sigma of a sampler's
    steps (Esser et al. 2024, eq. 23: t' = shift·t / (1 + (shift - 1)·t)). Training draws a logit-normal t
    (ibid., section 3.1), which is a normal ln sigma.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        sigma_min: float = 0.002,
        p_mean: float = 0.0,
        p_std: float = 1.0,
        shift: float = 1.0,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(network, autocast)
        self.sigma_min, self.sigma_max = sigma_min, math.inf
        self.p_mean, self.p_std, self.shift = p_mean, p_std, shift

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """x [N, C, H, W], sigma [N] > 0; returns x0, shaped and typed as x."""
        velocity = self.run_network(self.network, x, sigma, condition)
        return per_sample(_scale(sigma), x) * x - per_sample(time_of(sigma), x) * velocity

    def run_network(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """x_t and 1000·t through a network."""
        return self.call(network, per_sample(_scale(sigma), x) * x, TIMES * time_of(sigma), condition)

    def training_sigma(self, normal: Tensor) -> Tensor:
        """ln sigma = logit t ~ N(p_mean, p_std²)."""
        return (normal * self.p_std + self.p_mean).exp()

    def training_weight(self, sigma: Tensor) -> Tensor:
        """((1 + s)/s)² = 1/t²: the plain squared error of v."""
        return time_of(sigma) ** -2

    def fake_score_weight(self, sigma: Tensor) -> Tensor:
        """As in training: the plain squared error of v."""
        return self.training_weight(sigma)

    def ladder(self, count: int) -> Tensor:
        """The middles of `count` equal parts of t, shifted, from sigma_min to pure noise."""
        lowest = self.sigma_min / (self.shift + self.sigma_min)
        t = lowest + (1 - lowest) * (torch.arange(count, dtype=torch.float64) + 0.5) / count
        return self.shift * t / (1 - t)

    def spaced(self, steps: int, spacing: Spacing) -> Tensor:
        """t from 1 down in equal parts, shifted: the first sigma is infinite. Raises ValueError unless `trailing`."""
        if spacing != "trailing":
            raise ValueError(f"spacing={spacing}: a flow's steps are trailing ones, from t = 1 down")
        t = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
        return self.shift * t / (1 - t)


def time_of(sigma: Tensor) -> Tensor:
    """t = s/(1 + s), 1 where s is infinite."""
    return 1 / (1 + 1 / sigma)


def _scale(sigma: Tensor) -> Tensor:
    """1 - t = 1/(1 + s), which turns x into x_t; 1 where s is infinite and x is eps."""
    return torch.where(sigma.isinf(), torch.ones_like(sigma), 1 / (1 + sigma))
