"""The losses of DMD2 (Yin et al. 2024, 'Improved Distribution Matching Distillation') as pure functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipestill.diffusion.denoiser import per_sample


def distribution_matching_direction(x0: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """(F - T) / mean|x0 - T|, the mean over each sample: the direction that x0 descends (DMD, eqs. 7 and 8).

    x0 [N, C, H, W] is the student's output; `fake` and `real` are the fake score's and the teacher's denoised
    images of the same noised x0. A direction that is not finite is 0 for its sample.
    """
    scale = (x0 - real).abs().mean(dim=tuple(range(1, x0.ndim)), keepdim=True)
    return torch.nan_to_num((fake - real) / scale, nan=0.0, posinf=0.0, neginf=0.0)


def distribution_matching_loss(x0: Tensor, direction: Tensor) -> Tensor:
    """½·mean((x0 - stopgrad(x0 - direction))²): its gradient in x0 is direction / x0.numel() (DMD2's form)."""
    target = (x0 - direction).detach()
    return 0.5 * F.mse_loss(x0, target)


def fake_score_loss(denoised: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
    """mean(weight·(F(x0 + s·eps) - x0)²): denoising on the student's samples; weight [N]."""
    return (per_sample(weight, x0) * (denoised - x0).square()).mean()


def generator_gan_loss(fake_logits: Tensor) -> Tensor:
    """mean softplus(-D(fake)): the student makes its samples look real (non-saturating)."""
    return F.softplus(-fake_logits).mean()


def discriminator_gan_losses(fake_logits: Tensor, real_logits: Tensor) -> tuple[Tensor, Tensor]:
    """mean softplus(D(fake)) and mean softplus(-D(real)), to be added: samples are called fake and data real."""
    return F.softplus(fake_logits).mean(), F.softplus(-real_logits).mean()


def approximate_r1(real_logits: Tensor, jittered_logits: Tensor) -> Tensor:
    """mean (D(real) - D(real + sigma·eps))²: the finite-difference R1 penalty (Lin et al. 2025, APT, eq. 3)."""
    return (real_logits - jittered_logits).square().mean()


def ladder_range(ladder: Tensor, count: int, sigma_min: float, sigma_max: float, trim: float) -> Tensor:
    """The levels trim·N … (1 - trim)·N, both included, of a ladder of N that lie inside [sigma_min, sigma_max].

    N is `count`; a ladder with an infinite last level comes without it. DMD2's code draws indices from
    `randint(min_step, min(max_step + 1, N))` with min_step = trim·N and max_step = (1 - trim)·N: with N = 1000 and
    trim = 0.02 the 961 levels 20 … 980. Raises ValueError if no level is left.
    """
    cut = round(trim * count)
    kept = ladder[cut : max(count - cut + 1, 0)]
    tolerance = 1e-9
    kept = kept[(kept >= sigma_min * (1 - tolerance)) & (kept <= sigma_max * (1 + tolerance))]
    if not len(kept):
        raise ValueError(f"no noise level lies between {sigma_min} and {sigma_max} (trim={trim})")
    return kept
