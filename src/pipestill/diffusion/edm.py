"""EDM's preconditioning (Karras et al. 2022, 'Elucidating the Design Space of Diffusion-Based Generative Models')."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipestill.diffusion.conditions import Condition
from pipestill.diffusion.denoiser import Denoiser, per_sample
from pipestill.diffusion.schedules import Spacing, karras_ladder


class EDM(Denoiser):
    """EDM's preconditioning around a network that takes (x, c_noise, **condition) (Karras et al. 2022, table 1).

    c_skip = sd²/(s²+sd²), c_out = s·sd/√(s²+sd²), c_in = 1/√(s²+sd²), c_noise = ln(s)/4,
    D(x; s) = c_skip·x + c_out·F(c_in·x, c_noise). The arithmetic is that of x; only the network runs in
    `autocast`'s type where one is given.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        p_mean: float = -1.2,
        p_std: float = 1.2,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(network, autocast)
        self.sigma_data, self.sigma_min, self.sigma_max = sigma_data, sigma_min, sigma_max
        self.p_mean, self.p_std = p_mean, p_std

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """x [N, C, H, W], sigma [N] > 0; returns x0, shaped and typed as x."""
        s, data = per_sample(sigma, x), self.sigma_data
        total = s**2 + data**2
        output = self.run_network(self.network, x, sigma, condition)
        return data**2 / total * x + s * data / total.sqrt() * output

    def run_network(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The preconditioned input through a network (this one, or a view of it that ends at its bottleneck)."""
        c_in = (per_sample(sigma, x) ** 2 + self.sigma_data**2).rsqrt()
        c_noise = (sigma.log() / 4).to(next(network.parameters()).dtype)
        return self.call(network, c_in * x, c_noise, condition)

    def training_sigma(self, normal: Tensor) -> Tensor:
        """ln sigma ~ N(p_mean, p_std²)."""
        return (normal * self.p_std + self.p_mean).exp()

    def training_weight(self, sigma: Tensor) -> Tensor:
        """(s² + sd²) / (s·sd)², which gives every noise level the same weight at initialisation."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def fake_score_weight(self, sigma: Tensor) -> Tensor:
        """1/s² + 1/sd² (Yin et al. 2024, ImageNet-64 recipe)."""
        return 1 / sigma**2 + 1 / self.sigma_data**2

    def ladder(self, count: int) -> Tensor:
        """`count` Karras sigmas (DMD2's ImageNet recipe has 1,000)."""
        return karras_ladder(count, self.sigma_min, self.sigma_max)

    def spaced(self, steps: int, spacing: Spacing) -> Tensor:
        raise ValueError(f"spacing={spacing}: EDM's noise levels are continuous and have no steps, use karras")
