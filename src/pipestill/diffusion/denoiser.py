"""Denoisers: any network answers `denoise(x, sigma, condition) -> x0` through an adapter of its parametrisation.

An adapter (`edm.EDM`, `vp.VP`, `flow.Flow`) owns what differs between parametrisations: the preconditioning, its sigma
range and steps, the noise law for training and for DMD2, the loss weight, and the fake score's weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from pipestill.diffusion.conditions import Condition
from pipestill.diffusion.schedules import Spacing

AnyCondition = TypeVar("AnyCondition", bound=Condition)


class Denoise(Protocol):
    """The one language between networks and samplers.

    x [N, C, H, W] in sampler coordinates, x0 + sigma·eps; sigma [N] float; returns the expected clean image x0, shaped
    as x. Where sigma is infinite, x is eps itself.
    """

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor: ...


class Denoiser(nn.Module, ABC):
    """What an adapter offers beside denoising. Only the network runs in `autocast`'s type, where one is given.

    `sigma_max` may be infinite: pure noise.
    """

    sigma_min: float
    sigma_max: float

    def __init__(self, network: nn.Module, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.network = network
        self.autocast = autocast

    @abstractmethod
    def forward(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """x [N, C, H, W], sigma [N] > 0; returns x0, shaped and typed as x."""

    @abstractmethod
    def run_network(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The preconditioned input through a network (this one, or a view of it that ends at its bottleneck)."""

    @abstractmethod
    def training_sigma(self, normal: Tensor) -> Tensor:
        """Noise levels for training from standard normal draws of the same shape."""

    @abstractmethod
    def training_weight(self, sigma: Tensor) -> Tensor:
        """Weight of the squared x0 error in the denoising loss."""

    @abstractmethod
    def fake_score_weight(self, sigma: Tensor) -> Tensor:
        """Weight of the squared x0 error in the fake score's loss."""

    @abstractmethod
    def ladder(self, count: int) -> Tensor:
        """The noise levels that DMD2 draws from: `count` over the adapter's range, ascending, float64, all finite."""

    @abstractmethod
    def spaced(self, steps: int, spacing: Spacing) -> Tensor:
        """`steps` of the parametrisation's own noise levels, decreasing, and a final 0: [steps + 1] float64.

        Raises ValueError where it has no such steps.
        """

    def call(self, network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """What a network makes of its preconditioned input x at `time` [N], in x's type."""
        dtype = next(network.parameters()).dtype
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            output: Tensor = network(x.to(dtype), time, **condition.inputs(), return_dict=False)[0]
        return output.to(x.dtype)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[N] reshaped so that it multiplies `like` [N, ...]."""
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def clipped(denoise: Denoise) -> Denoise:
    """x0 clamped to the range of images, [-1, 1]: what DDPM's samplers do in pixels (Ho et al. 2020's code)."""

    def inside(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return denoise(x, sigma, condition).clamp(-1, 1)

    return inside


def noised(x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """x0 + sigma·eps [N, C, H, W], sigma [N]; eps where sigma is infinite."""
    s = per_sample(sigma, x0)
    return torch.where(s.isinf(), eps, x0 + s.nan_to_num(posinf=0.0) * eps)
