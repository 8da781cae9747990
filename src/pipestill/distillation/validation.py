"""The validation distance during distillation: the averaged student's samples against the validation part."""

from __future__ import annotations

import math

import torch

from pipestill.config import ValidationParams
from pipestill.config.fields import MixName
from pipestill.diffusion.denoiser import Denoiser
from pipestill.diffusion.samplers import SAMPLERS
from pipestill.distributed import World
from pipestill.errors import SurroundingsError
from pipestill.evaluation.moments import Moments, frechet_distance
from pipestill.evaluation.reference import Reference
from pipestill.networks.model import ModelCard
from pipestill.sampling.items import sample_items, to_uint8
from pipestill.sampling.plan import labels_in
from pipestill.training.ema import Ema
from pipestill.training.ranks import averaged


class Validation:
    """Samples the same items each time, over ranks in fixed blocks, and measures them in one extractor's space."""

    def __init__(
        self, reference: Reference, card: ModelCard, params: ValidationParams, plan: MixName, world: World
    ) -> None:
        self._card, self._params, self._world = card, params, world
        self._extractor = reference.extractor(params.extractor, world.device)
        self._target, mix = reference.in_mix("validation", params.extractor, plan)
        self._labels = labels_in(mix, math.ceil(params.images / params.micro_batch) * params.micro_batch)

    @torch.no_grad()
    def distance(self, student: Denoiser, ema: Ema) -> float:
        """Fréchet distance of the averaged student to the validation part, the same on every rank."""
        params, world, card = self._params, self._world, self._card
        assert card.native is not None
        features = {}
        with averaged(student.network, ema):
            for block in range(world.rank, math.ceil(params.images / params.micro_batch), world.size):
                items = torch.arange(params.micro_batch) + block * params.micro_batch
                labels = self._labels[items].to(world.device)
                x0 = sample_items(
                    student,
                    sampler=SAMPLERS[card.native.transition],
                    sigmas=card.native.sigmas(student),
                    condition=card.condition(labels),
                    seed=params.seed,
                    items=items,
                    shape=(card.channels, card.resolution, card.resolution),
                    device=world.device,
                )
                if not torch.isfinite(x0).all():
                    raise SurroundingsError("the student's samples are not finite: lower distillation learning rates")
                features[block] = self._extractor(to_uint8(x0)).cpu()
        blocks: dict[int, torch.Tensor] = {}
        for part in world.gather(features):
            blocks |= part
        table = torch.cat([blocks[block] for block in sorted(blocks)])[: params.images]
        return frechet_distance(Moments.of(table), self._target)
