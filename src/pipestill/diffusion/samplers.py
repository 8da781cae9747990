"""Samplers: one shape, `sample(denoise, x, sigmas, condition, noise) -> x0`, for every model.

`x` [N, C, H, W] is `start(eps, sigmas[0])`; `sigmas` come from `schedules` or an adapter, the last one 0, the first one
maybe infinite; `noise(step)` gives the fresh standard normal noise of a stochastic step. Arithmetic is in x's type;
step coefficients are Python floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from pipestill.diffusion.conditions import Condition
from pipestill.diffusion.denoiser import Denoise

Noise = Callable[[int], Tensor]
Sample = Callable[[Denoise, Tensor, Tensor, Condition, Noise], Tensor]
Transition = Literal["euler", "renoise"]


def _at(sigma: float, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), sigma, device=x.device, dtype=x.dtype)


def start(eps: Tensor, sigma: float) -> Tensor:
    """Where sampling starts from standard normal eps: sigma·eps, or eps itself where sigma is infinite."""
    return eps if math.isinf(sigma) else sigma * eps


def euler_step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """x' = x0 + (s'/s)·(x - x0): the Euler step of the probability-flow ODE, equal to DDIM with eta 0.

    Its limit at s = ∞, where x is eps, is x0 + s'·eps.
    """
    return x0 + sigma_next * x if math.isinf(sigma) else x0 + (sigma_next / sigma) * (x - x0)


def renoise_step(x0: Tensor, sigma_next: float, eps: Tensor) -> Tensor:
    """x' = x0 + s'·eps: published multi-step DMD2 (Yin et al. 2024, section 4.4)."""
    return x0 + sigma_next * eps


def walk(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    condition: Condition,
    noise: Noise,
    transition: Transition,
    steps: int | None = None,
) -> Tensor:
    """The first `steps` steps (default: all) of a one-call-a-step sampler; returns x at sigmas[steps].

    A student's sampler and the rollout of its training are this same function.
    """
    levels = sigmas.tolist()
    for i in range(len(levels) - 1 if steps is None else steps):
        x0 = denoise(x, _at(levels[i], x), condition)
        if levels[i + 1] == 0:
            x = x0
        elif transition == "euler":
            x = euler_step(x, x0, levels[i], levels[i + 1])
        else:
            x = renoise_step(x0, levels[i + 1], noise(i))
    return x


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, condition: Condition, noise: Noise) -> Tensor:
    """Euler's method, DDIM: one evaluation a step."""
    return walk(denoise, x, sigmas, condition, noise, "euler")


def renoise(denoise: Denoise, x: Tensor, sigmas: Tensor, condition: Condition, noise: Noise) -> Tensor:
    """Denoise, then noise afresh to the next level: one evaluation a step."""
    return walk(denoise, x, sigmas, condition, noise, "renoise")


def ancestral(denoise: Denoise, x: Tensor, sigmas: Tensor, condition: Condition, noise: Noise) -> Tensor:
    """DDPM's ancestral sampling (Ho et al. 2020, algorithm 2, with the posterior's variance): one evaluation a step.

    Of x = x0 + s·eps, q(x' | x, x0) has the mean x0 + (s'/s)²·(x - x0) and the variance s'²·(1 - (s'/s)²).
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x0 = denoise(x, _at(sigma, x), condition)
        if sigma_next == 0:
            x = x0
            continue
        kept = (sigma_next / sigma) ** 2
        back = kept * (x - x0) if kept else 0.0  # nothing is left of pure noise
        x = x0 + back + sigma_next * math.sqrt(1 - kept) * noise(i)
    return x


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, condition: Condition, noise: Noise) -> Tensor:
    """Heun's second-order method (Karras et al. 2022, algorithm 1): 2·steps - 1 evaluations."""
    levels = sigmas.tolist()
    for sigma, sigma_next in pairwise(levels):
        x = _heun_step(denoise, x, sigma, sigma_next, condition)
    return x


def _heun_step(denoise: Denoise, x: Tensor, sigma: float, sigma_next: float, condition: Condition) -> Tensor:
    if math.isinf(sigma):  # no slope reaches that far: DDIM's step
        return euler_step(x, denoise(x, _at(sigma, x), condition), sigma, sigma_next)
    slope = (x - denoise(x, _at(sigma, x), condition)) / sigma
    ahead = x + (sigma_next - sigma) * slope
    if sigma_next == 0:
        return ahead
    slope_ahead = (ahead - denoise(ahead, _at(sigma_next, x), condition)) / sigma_next
    return x + (sigma_next - sigma) * 0.5 * (slope + slope_ahead)


@dataclass(frozen=True)
class StochasticHeun:
    """EDM's stochastic sampler (Karras et al. 2022, algorithm 2): noise is churned in before each Heun step."""

    churn: float = 40.0
    s_min: float = 0.05
    s_max: float = 50.0
    s_noise: float = 1.003

    def __call__(self, denoise: Denoise, x: Tensor, sigmas: Tensor, condition: Condition, noise: Noise) -> Tensor:
        levels = sigmas.tolist()
        for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
            inside = self.s_min <= sigma <= self.s_max
            gamma = min(self.churn / (len(levels) - 1), math.sqrt(2) - 1) if inside else 0.0
            higher = sigma * (1 + gamma)
            if gamma > 0:
                x = x + math.sqrt(higher**2 - sigma**2) * self.s_noise * noise(i)
            x = _heun_step(denoise, x, higher, sigma_next, condition)
        return x


def dpm_solver_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, condition: Condition, noise: Noise) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2) for x = x0 + sigma·eps: one evaluation a step.

    With t = -ln sigma and h = t' - t: x' = (s'/s)·x - (e^-h - 1)·D, D extrapolated from this and the previous x0.
    """
    levels = sigmas.tolist()
    previous, h_previous = None, 0.0
    for sigma, sigma_next in pairwise(levels):
        x0 = denoise(x, _at(sigma, x), condition)
        if sigma_next == 0:
            return x0
        if math.isinf(sigma):
            x = euler_step(x, x0, sigma, sigma_next)
            continue  # and no slope comes from there: the second step is the first of its order
        h = math.log(sigma / sigma_next)
        estimate = x0
        if previous is not None:
            ratio = h_previous / h
            estimate = (1 + 0.5 / ratio) * x0 - 0.5 / ratio * previous
        x = (sigma_next / sigma) * x - math.expm1(-h) * estimate
        previous, h_previous = x0, h
    return x


SAMPLERS: dict[str, Sample] = {"euler": euler, "heun": heun, "2m": dpm_solver_2m, "renoise": renoise, "ddpm": ancestral}


def evaluations(sampler: str, steps: int, *, pure: bool = False) -> int:
    """Network calls an image that a sampler spends on `steps` steps, one guidance branch.

    Heun's method takes two a step but the last, and but the first where that starts from pure noise.
    """
    if sampler not in ("heun", "heun-churn"):
        return steps
    return 2 * steps - 1 - (pure and steps > 1)
