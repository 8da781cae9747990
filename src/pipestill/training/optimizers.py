"""AdamW, warm-up and schedules: the learning rate is a function of the update, so nothing of it needs saving."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pipestill.config import OptimizerParams


def learning_rate(base: float, params: OptimizerParams, update: int, updates: int) -> float:
    """The rate of update `update` (from 0) of `updates`: linear warm-up, then constant, linear or cosine to 0.

    The decay begins after the share `decay_from` of the run.
    """
    warm = min(1.0, (update + 1) / (params.warmup + 1))
    begin = params.decay_from * updates
    if params.schedule == "constant" or update < begin:
        return base * warm
    left = (updates - update) / max(updates - begin, 1)
    return base * warm * (left if params.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


def adamw(parameters: Iterable[nn.Parameter], base: float, params: OptimizerParams) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019)."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=base, betas=params.betas, weight_decay=params.weight_decay, fused=True)


def step(optimizer: torch.optim.Optimizer, base: float, params: OptimizerParams, update: int, updates: int) -> Tensor:
    """Clips the gradients, sets the rate, steps and clears; returns the gradient norm before clipping, a scalar."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, params.clip if params.clip > 0 else math.inf, foreach=True)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(base, params, update, updates)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.detach()
