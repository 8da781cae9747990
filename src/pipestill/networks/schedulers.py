"""Diffusers' schedulers as descriptions of noise: what a DDPM was trained with, and what its model folder says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from pipestill.config import VpParams
from pipestill.diffusion.schedules import vp_sigmas

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler


def ddpm_scheduler(params: VpParams) -> DDPMScheduler:
    """Diffusers' scheduler with these parameters, from the last step on (Lin et al. 2023, section 3.3)."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=params.steps,
        beta_schedule=params.schedule,
        beta_start=params.beta_start,
        beta_end=params.beta_end,
        prediction_type=params.prediction,
        rescale_betas_zero_snr=params.zero_terminal_snr,
        clip_sample=False,
        timestep_spacing="trailing",
    )


def training_sigmas(params: VpParams) -> Tensor:
    """The noise levels of the scheduler's steps: [T] float64, ascending."""
    return vp_sigmas(ddpm_scheduler(params).betas)
