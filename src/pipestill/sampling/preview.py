"""Pictures during a training: the same classes and noise each time, one grid a preview, rows by class."""

from __future__ import annotations

from pathlib import Path

import torch

from pipestill.diffusion.denoiser import EDM
from pipestill.diffusion.samplers import SAMPLERS
from pipestill.diffusion.schedules import karras
from pipestill.networks.model import ModelCard
from pipestill.sampling.items import sample_items, to_uint8
from pipestill.sampling.pictures import grid, save_png
from pipestill.training.ema import Ema
from pipestill.training.ranks import averaged
from pipestill.training.tracking import Tracker

ROWS, COLUMNS, HEUN_STEPS = 10, 8, 18


class Preview:
    """Samples a grid from the averaged weights, writes it below `folder` and hands it to the trackers."""

    def __init__(self, denoiser: EDM, card: ModelCard, ema: Ema, folder: Path, tracker: Tracker) -> None:
        self._denoiser, self._card, self._ema, self._folder, self._tracker = denoiser, card, ema, folder, tracker

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        card = self._card
        device = next(self._denoiser.parameters()).device
        rows = min(len(card.classes) or ROWS, ROWS)
        labels = torch.arange(rows, device=device).repeat_interleave(COLUMNS)
        if card.native is None:
            sampler, sigmas = SAMPLERS["heun"], karras(HEUN_STEPS, self._denoiser.sigma_min, self._denoiser.sigma_max)
        else:
            sampler, sigmas = SAMPLERS[card.native.transition], card.native.sigmas()
        with averaged(self._denoiser.network, self._ema):
            x0 = sample_items(
                self._denoiser,
                sampler=sampler,
                sigmas=sigmas,
                condition=card.condition(labels),
                seed=0,
                items=torch.arange(len(labels)),
                shape=(card.channels, card.resolution, card.resolution),
                device=device,
            )
        picture = grid(to_uint8(x0).permute(0, 2, 3, 1).cpu().numpy(), columns=COLUMNS)
        save_png(picture, self._folder / f"step-{step:08d}.png")
        self._tracker.image(step, "samples", picture)
