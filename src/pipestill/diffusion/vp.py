"""The variance-preserving parametrisation: networks that predict eps or v at a step of a discrete schedule.

DDPM (Ho et al. 2020), v-prediction (Salimans & Ho 2022, 'Progressive Distillation'), in coordinates x0 + sigma·eps:
sigma = sqrt((1 - abar) / abar), and the network sees sqrt(abar)·x.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from pipestill.diffusion.conditions import Condition
from pipestill.diffusion.denoiser import Denoiser, per_sample
from pipestill.diffusion.schedules import Spacing, spaced_steps

Prediction = Literal["epsilon", "v_prediction"]  # as Diffusers' schedulers call them
Time = Literal["fractional", "snapped"]
Weighting = Literal["prediction", "min_snr"]


class VP(Denoiser):
    """A network that takes (sqrt(abar)·x, t, **condition) and predicts eps, or v = sqrt(abar)·eps - sqrt(1-abar)·x0.

    `sigmas` [T] float64, ascending, are the noise levels of t = 0 … T-1; the last may be infinite (zero terminal SNR),
    where v alone says anything of x0. Between two of them t is linear in arctan(sigma), which stays finite, or the
    nearer of the two (`snapped`). x0 = x - sigma·eps, or abar·x - sqrt(1-abar)·v.

    Raises ValueError where eps is asked for at an infinite sigma.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        sigmas: Tensor,
        prediction: Prediction = "epsilon",
        time: Time = "fractional",
        weighting: Weighting = "prediction",
        snr_gamma: float = 5.0,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(network, autocast)
        self.sigma_min, self.sigma_max = float(sigmas[0]), float(sigmas[-1])
        if math.isinf(self.sigma_max) and prediction == "epsilon":
            raise ValueError("pure noise says nothing of x0 by its eps: zero terminal SNR needs v_prediction")
        self._sigmas = sigmas.double().cpu()
        self._tables: dict[torch.device, Tensor] = {}
        self.prediction, self.time, self.weighting, self.snr_gamma = prediction, time, weighting, snr_gamma

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """x [N, C, H, W], sigma [N] > 0; returns x0, shaped and typed as x."""
        output = self.run_network(self.network, x, sigma, condition)
        if self.prediction == "epsilon":
            return x - per_sample(sigma, x) * output
        signal, noise = _signal_and_noise(sigma)
        # abar·x is sqrt(abar)·x_vp, which is 0 at infinity however x is read there
        return per_sample(signal**2, x) * x - per_sample(noise, x) * output

    def run_network(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """sqrt(abar)·x, which is eps at an infinite sigma, and t through a network."""
        signal, _ = _signal_and_noise(sigma)
        scale = torch.where(sigma.isinf(), torch.ones_like(signal), signal)
        return self.call(network, per_sample(scale, x) * x, self.step_of(sigma), condition)

    def step_of(self, sigma: Tensor) -> Tensor:
        """t in [0, T-1] of noise levels [N], float32, fractional or whole as `time` says."""
        angle, angles = sigma.double().arctan(), self._table(sigma.device).arctan()
        above = torch.searchsorted(angles, angle).clamp(1, len(angles) - 1)
        low, high = angles[above - 1], angles[above]
        t = above - 1 + ((angle - low) / (high - low)).clamp(0, 1)
        return (t.round() if self.time == "snapped" else t).float()

    def training_sigma(self, normal: Tensor) -> Tensor:
        """t uniform over the T steps (Ho et al. 2020, algorithm 1)."""
        count = len(self._sigmas)
        t = (torch.special.ndtr(normal.double()) * count).long().clamp(max=count - 1)
        return self._table(normal.device)[t].to(normal.dtype)

    def training_weight(self, sigma: Tensor) -> Tensor:
        """What makes the x0 error that of the prediction: SNR for eps, SNR + 1 for v; or min(SNR, gamma).

        SNR = 1/sigma². The first is Ho et al. 2020, eq. 14, the last Hang et al. 2023, 'Min-SNR', for any prediction.
        """
        if self.weighting == "min_snr":
            return (1 / sigma**2).clamp(max=self.snr_gamma)
        return self.fake_score_weight(sigma)

    def fake_score_weight(self, sigma: Tensor) -> Tensor:
        """The plain error of the prediction: 1/s² for eps, 1/s² + 1 for v."""
        return 1 / sigma**2 + (self.prediction == "v_prediction")

    def ladder(self, count: int) -> Tensor:
        """`count` of the T steps, evenly spaced, those of infinite noise left out."""
        t = torch.linspace(0, len(self._sigmas) - 1, count, dtype=torch.float64).round().long()
        sigmas = self._sigmas[t]
        return sigmas[sigmas.isfinite()]

    def spaced(self, steps: int, spacing: Spacing) -> Tensor:
        """Some of the T steps as Diffusers spaces them, and a final 0. Raises ValueError for more steps than T."""
        t = spaced_steps(steps, len(self._sigmas), spacing)
        return torch.cat([self._sigmas[t], self._sigmas.new_zeros(1)])

    def _table(self, device: torch.device) -> Tensor:
        """The schedule's noise levels on a device. No buffer: DDP would send it round in every forward pass."""
        if device not in self._tables:
            self._tables[device] = self._sigmas.to(device)
        return self._tables[device]


def _signal_and_noise(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar) and sqrt(1 - abar) of noise levels [N]: 1/√(1+s²) and s/√(1+s²)."""
    signal = (1 + sigma**2).rsqrt()
    return signal, torch.where(sigma.isinf(), torch.ones_like(sigma), sigma * signal)
