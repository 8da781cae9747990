"""Teacher training: the EDM loss on real images, with label dropout, gradient accumulation, EMA and DDP."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipestill import counter
from pipestill.config import TrainingParams
from pipestill.data.loader import Batch, Cache, Loader, to_floats
from pipestill.data.store import Dataset
from pipestill.diffusion.denoiser import Denoiser
from pipestill.distributed import World
from pipestill.errors import InputError
from pipestill.networks.model import ModelCard
from pipestill.training import optimizers
from pipestill.training.clock import Clock, phase
from pipestill.training.ema import Ema, decay_at, warnings
from pipestill.training.losses import denoising_loss
from pipestill.training.ranks import averaged, distributed, seed_torch, synchronised

VALIDATION_IMAGES, VALIDATION_BLOCK = 1024, 128


class TeacherTraining:
    """Trains a denoiser on a dataset's train part; a `Training` for the loop.

    All randomness belongs to positions of the data stream, so an update is a function of its number.
    """

    clock: Clock | None = None  # where somebody measures the phases of an update
    apart = False  # ranks keep their gradients to themselves: for measuring what collectives cost, never for training

    def __init__(
        self, denoiser: Denoiser, card: ModelCard, dataset: Dataset, params: TrainingParams, world: World, cache: Cache
    ) -> None:
        if params.batch % (world.size * params.accumulation):
            raise InputError(
                f"training.batch={params.batch} cannot be shared by {world.size} ranks x "
                f"{params.accumulation} accumulation steps"
            )
        self.updates = params.iterations
        self._denoiser, self._card, self._dataset, self._params, self._world = denoiser, card, dataset, params, world
        self._loader = Loader(
            dataset,
            "train",
            batch=params.batch,
            seed=params.seed,
            rank=world.rank,
            size=world.size,
            cache=cache,
            device=world.device,
            balanced=params.balanced,
        )
        denoiser.train()  # a network that was loaded is in eval mode, without dropout
        self._trained = distributed(denoiser, world)
        self._optimizer = optimizers.adamw(denoiser.parameters(), params.learning_rate, params.optimizer)
        self.ema = Ema(denoiser.network, params.ema.sync_every)
        self.warnings = warnings(params.ema, updates=params.iterations, batch=params.batch)

    def update(self, step: int) -> dict[str, Tensor]:
        params = self._params
        seed_torch(params.seed, step, self._world.rank)  # dropout inside the network
        with phase(self.clock, "data"):
            batch = self._loader.batch(step)
        parts = params.accumulation
        total = torch.zeros((), device=self._world.device)
        for part in range(parts):
            rows = slice(part * len(batch.labels) // parts, (part + 1) * len(batch.labels) // parts)
            with synchronised(self._trained, last=part == parts - 1 and not self.apart):
                with phase(self.clock, "forward"):
                    loss = self._loss(self._trained, batch, rows) / parts
                with phase(self.clock, "backward"):
                    loss.backward()
            total += loss.detach()
        with phase(self.clock, "optimizer"):
            norm = optimizers.step(self._optimizer, params.learning_rate, params.optimizer, step, self.updates)
        decay = decay_at(params.ema, update=step, batch=params.batch)
        with phase(self.clock, "ema"):
            self.ema.update(self._denoiser.network, decay)
        return {"loss": total, "gradient_norm": norm}

    def _loss(self, denoise: nn.Module, batch: Batch, rows: slice) -> Tensor:
        """EDM's loss on some rows of a batch; noise, noise level and label dropout belong to stream positions."""
        params = self._params
        images, items = batch.images[rows], batch.positions[rows]
        sigma, eps = self._noise("train", items, images)
        condition = self._card.condition(batch.labels[rows])
        if params.label_dropout > 0 and self._card.classes:
            condition = condition.dropped(counter.uniform(params.seed, "train/drop", items) < params.label_dropout)
        return denoising_loss(denoise, images, sigma, eps, condition, self._denoiser.training_weight(sigma))

    def _noise(self, purpose: str, items: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        level = counter.normal(self._params.seed, f"{purpose}/sigma", items)
        sigma = self._denoiser.training_sigma(level)
        return sigma, counter.normal(self._params.seed, f"{purpose}/noise", items, images.shape[1:])

    def epoch(self, step: int) -> int:
        """How often the train part was gone through after `step` updates."""
        return step * self._params.batch // len(self._loader)

    def warm_up(self) -> None:
        """One backward without a step: DDP orders its buckets in its first, so that a resumed run sums as this one."""
        if self._world.size == 1:
            return
        self._loss(self._trained, self._loader.batch(0), slice(None)).backward()
        self._optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """The EMA's loss on the validation part with noise fixed by item, shared over ranks."""
        every = self._params.validate_every
        if not every or (step % every and step != self.updates):
            return {}
        held_out = self._dataset.split["validation"]
        if not len(held_out):
            return {}
        if len(held_out) > VALIDATION_IMAGES:  # in order of classes: an even stride takes its share of each
            held_out = held_out[np.linspace(0, len(held_out) - 1, VALIDATION_IMAGES).astype(np.int64)]
        total = torch.zeros((), dtype=torch.float64)
        with averaged(self._denoiser.network, self.ema):
            for block in range(self._world.rank, math.ceil(len(held_out) / VALIDATION_BLOCK), self._world.size):
                indices = held_out[block * VALIDATION_BLOCK : (block + 1) * VALIDATION_BLOCK]
                pixels = torch.from_numpy(self._dataset.images(indices)).permute(0, 3, 1, 2)
                images = to_floats(pixels.to(self._world.device))
                items = torch.from_numpy(indices).to(self._world.device)
                condition = self._card.condition(torch.from_numpy(self._dataset.labels[indices]).to(self._world.device))
                sigma, eps = self._noise("validate", items, images)
                weight = self._denoiser.training_weight(sigma)
                loss = denoising_loss(self._denoiser, images, sigma, eps, condition, weight)
                total += float(loss) * len(indices)
        return {"validation_loss": float(self._world.sum(total)) / len(held_out)}

    def state(self) -> dict[str, Any]:
        return {
            "network": self._denoiser.network.state_dict(),
            "ema": self.ema.tensors,
            "optimizer": self._optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self._denoiser.network.load_state_dict(state["network"])
        self.ema.load(state["ema"])
        self._optimizer.load_state_dict(state["optimizer"])
