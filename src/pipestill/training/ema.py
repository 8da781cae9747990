"""Exponential moving averages of weights, by half-life in images or by a fixed decay an update."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipestill.config import EmaParams


def decay_at(params: EmaParams, *, seen: int, batch: int) -> float:
    """How much of the average an update keeps, after `seen` images, `batch` of them in this update.

    Half-life form (Karras et al. 2022, EDM's training): 0.5^(batch / half-life), the half-life at most
    `ramp_up` x seen.
    """
    if params.kind == "decay":
        return params.decay
    half_life = float(params.half_life)
    if params.ramp_up > 0:
        half_life = min(half_life, seen * params.ramp_up)
    return float(0.5 ** (batch / max(half_life, 1e-8)))


class Ema:
    """The average of a module's parameters and buffers, on the module's device, in their own type."""

    def __init__(self, module: nn.Module) -> None:
        self.tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, decay: float) -> None:
        """average += (1 - decay)·(weights - average); what is not floating point is copied."""
        state = module.state_dict()
        floating = [name for name, tensor in state.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.tensors[n] for n in floating], [state[n] for n in floating], 1 - decay)
        for name in state.keys() - set(floating):
            self.tensors[name].copy_(state[name])

    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
