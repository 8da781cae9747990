"""Backward simulation: the student walks from fresh noise with the sampler's own step function, without gradient.

What a rollout leaves are the inputs of student steps: the states at which the student is then trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipestill import counter
from pipestill.diffusion.conditions import Condition
from pipestill.diffusion.denoiser import Denoise
from pipestill.diffusion.samplers import Transition, walk


@dataclass(frozen=True)
class States:
    """Inputs of student steps: x [N, C, H, W] at noise levels sigma [N], with their conditions.

    `outputs` are the student's x0 there where the rollout computed them on its way, else None.
    """

    x: Tensor
    sigma: Tensor
    condition: Condition
    outputs: Tensor | None = None


@dataclass(frozen=True)
class Start:
    """Where a rollout begins: items with their conditions, and the schedule that they walk."""

    items: Tensor  # [N] int64, on the device of the student
    condition: Condition
    sigmas: Tensor  # [steps + 1], the last 0
    transition: Transition
    seed: int
    purpose: str
    shape: tuple[int, ...]  # C, H, W

    def latent(self) -> Tensor:
        """sigma_0·eps by item, [N, C, H, W]."""
        return float(self.sigmas[0]) * counter.normal(self.seed, f"{self.purpose}/latent", self.items, self.shape)

    def noise(self, step: int) -> Tensor:
        """The fresh noise of a renoising step, by item."""
        return counter.normal(self.seed, f"{self.purpose}/step", self.items, self.shape, draw=step)


@torch.no_grad()
def fresh(denoise: Denoise, start: Start, stop: int) -> States:
    """Walks every item to step `stop`, one stop for the whole batch, as published (DMD2, section 4.5)."""
    x = walk(denoise, start.latent(), start.sigmas, start.condition, start.noise, start.transition, steps=stop)
    return States(x, x.new_full((len(x),), float(start.sigmas[stop])), start.condition)


@torch.no_grad()
def every_step(denoise: Denoise, start: Start) -> States:
    """Walks every item to the end and keeps the input of each step: steps × items states, with their outputs.

    Step by step, all items of a step together. Equal shares of all steps at one student forward a state, where
    `fresh` spends (steps + 1) / 2.
    """
    inputs, outputs, levels = [], [], []

    def recording(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        x0 = denoise(x, sigma, condition)
        inputs.append(x)
        outputs.append(x0)
        levels.append(sigma)
        return x0

    walk(recording, start.latent(), start.sigmas, start.condition, start.noise, start.transition)
    order = torch.arange(len(start.items), device=start.items.device).repeat(len(levels))
    return States(torch.cat(inputs), torch.cat(levels), start.condition.select(order), torch.cat(outputs))
