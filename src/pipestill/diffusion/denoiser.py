"""Denoisers: adapters that let any network answer `denoise(x, sigma, condition) -> x0`.

An adapter owns what differs between parametrisations: the preconditioning, its sigma range, the noise law for
training, the loss weight, and the fake score's weight. `VP` and `Flow` are one class each beside `EDM`.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from pipestill.diffusion.conditions import Condition

AnyCondition = TypeVar("AnyCondition", bound=Condition)


class Denoise(Protocol):
    """The one language between networks and samplers.

    x [N, C, H, W] in sampler coordinates; sigma [N] float; returns the expected clean image x0, shaped as x.
    """

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor: ...


class Denoiser(Protocol):
    """What an adapter offers beside denoising."""

    network: nn.Module
    sigma_min: float
    sigma_max: float

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor: ...

    def training_sigma(self, normal: Tensor) -> Tensor:
        """Noise levels for training from standard normal draws of the same shape."""
        ...

    def training_weight(self, sigma: Tensor) -> Tensor:
        """Weight of the squared x0 error in the denoising loss."""
        ...

    def fake_score_weight(self, sigma: Tensor) -> Tensor:
        """Weight of the squared x0 error in the fake score's loss."""
        ...


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[N] reshaped so that it multiplies `like` [N, ...]."""
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


class EDM(nn.Module):
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
        super().__init__()
        self.network = network
        self.sigma_data, self.sigma_min, self.sigma_max = sigma_data, sigma_min, sigma_max
        self.p_mean, self.p_std = p_mean, p_std
        self.autocast = autocast

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """x [N, C, H, W], sigma [N] > 0; returns x0, shaped and typed as x."""
        s, data = per_sample(sigma, x), self.sigma_data
        total = s**2 + data**2
        output = self.run_network(self.network, x, sigma, condition)
        return data**2 / total * x + s * data / total.sqrt() * output

    def run_network(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The preconditioned input through a network (this one, or a view of it that ends at its bottleneck)."""
        c_in = (per_sample(sigma, x) ** 2 + self.sigma_data**2).rsqrt()
        dtype = next(network.parameters()).dtype
        noise = (sigma.log() / 4).to(dtype)
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            output: Tensor = network((c_in * x).to(dtype), noise, **condition.inputs(), return_dict=False)[0]
        return output.to(x.dtype)

    def training_sigma(self, normal: Tensor) -> Tensor:
        """ln sigma ~ N(p_mean, p_std²)."""
        return (normal * self.p_std + self.p_mean).exp()

    def training_weight(self, sigma: Tensor) -> Tensor:
        """(s² + sd²) / (s·sd)², which gives every noise level the same weight at initialisation."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def fake_score_weight(self, sigma: Tensor) -> Tensor:
        """1/s² + 1/sd² (Yin et al. 2024, ImageNet-64 recipe)."""
        return 1 / sigma**2 + 1 / self.sigma_data**2
