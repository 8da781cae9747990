"""DMD2 (Yin et al. 2024): student, fake score and discriminator trained in turn against a frozen teacher.

Every draw belongs to an item, so a turn is a function of its number, and ranks agree on the stop step without asking.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipestill import counter
from pipestill.config import StudentParams
from pipestill.config.students import DistributionMatchingParams, GanParams
from pipestill.diffusion.conditions import Condition
from pipestill.diffusion.denoiser import Denoiser, noised
from pipestill.diffusion.guidance import guided
from pipestill.distillation import losses, rollout
from pipestill.distillation.discriminator import FakeScore
from pipestill.distillation.rollout import States, Walkers
from pipestill.distributed import World
from pipestill.errors import InputError
from pipestill.networks.model import ModelCard, on_host
from pipestill.training import optimizers
from pipestill.training.ema import Ema, decay_at, warnings
from pipestill.training.ranks import distributed

if TYPE_CHECKING:
    from pipestill.data.loader import Loader
    from pipestill.distillation.validation import Validation


class Distillation:
    """One student's training; a `Training` for the loop. One update is a generator update and its fake-score updates.

    A turn's batch is the same for any number of ranks: `params.batch` states, or, with `every_step` rollouts, as many
    as whole trajectories have. Labels are drawn from `mix` [classes], which is empty without classes. Real images come
    from `loader`, which only a GAN needs. Networks run in eval mode, as DMD2 runs them with dropout 0; gradients flow
    all the same.
    """

    def __init__(
        self,
        *,
        student: Denoiser,
        teacher: Denoiser,
        fake: FakeScore,
        card: ModelCard,
        params: StudentParams,
        loader: Loader | None,
        validation: Validation,
        world: World,
        train_images: int,
        mix: NDArray[np.int64],
    ) -> None:
        if card.native is None:
            raise InputError("a student needs its own schedule")
        self.updates = params.iterations
        self._train_images = train_images
        self._student, self._teacher, self._fake = student, teacher, fake
        self._card, self._params, self._loader, self._validation, self._world = card, params, loader, validation, world
        self._shape = (card.channels, card.resolution, card.resolution)
        sigmas, transition = card.native.sigmas(student), card.native.transition
        self._ends = torch.from_numpy(np.cumsum(mix if len(mix) else [1])).to(world.device)
        self._walkers = Walkers(student, self._condition, sigmas, transition, params.seed, self._shape, world)
        self._rollout = rollout.source(params, self._walkers)
        self._real_score = guided(teacher, params.dm.guidance)
        ladder = teacher.ladder(params.dm.ladder)
        self._dm_levels = self._levels(ladder, "dm", params.dm, params.dm.trim)
        self._fake_levels = ladder.float().to(world.device)
        self._gan_levels = self._levels(ladder, "gan", params.gan, 0.0)
        student.eval()
        fake.eval()
        self._student_trained = distributed(student, world)
        self._fake_trained = distributed(fake, world)
        self._student_optimizer = optimizers.adamw(student.parameters(), params.generator_lr, params.optimizer)
        self._fake_optimizer = optimizers.adamw(fake.parameters(), params.fake_score_lr, params.optimizer)
        self.ema = Ema(student.network, params.ema.sync_every)
        self._first = params.gan.start if params.dm.weight == 0 else 0  # updates before it leave the student as it is
        self.warnings = warnings(params.ema, updates=self.updates - self._first, batch=self.states)
        self.best_step, self.best_distance = 0, math.inf
        self.best: dict[str, dict[str, Tensor]] = {}

    @property
    def states(self) -> int:
        """Student inputs in a turn, over all ranks: `params.batch`, or as many as whole trajectories have."""
        return self._rollout.states

    def _levels(self, ladder: Tensor, name: str, limits: DistributionMatchingParams | GanParams, trim: float) -> Tensor:
        try:
            kept = losses.ladder_range(ladder, self._params.dm.ladder, limits.sigma_min, limits.sigma_max, trim)
        except ValueError as error:
            raise InputError(f"distillation: {name}.sigma_min and {name}.sigma_max: {error}") from error
        return kept.float().to(self._world.device)

    # --- one update -----------------------------------------------------------------------------------------------

    def update(self, step: int) -> dict[str, Tensor]:
        params = self._params
        sums: dict[str, Tensor] = {}
        generator: dict[str, Tensor] = {}
        for part in range(params.update_ratio):
            turn = step * params.update_ratio + part
            states, items = self._rollout.take(turn)
            if part == 0:
                x0, generator = self._update_generator(step, states, items)
            else:
                x0 = states.outputs if states.outputs is not None else self._student_output(states)
            for name, value in self._update_fake(turn, x0, states.condition, items).items():
                sums[name] = sums.get(name, 0) + value / params.update_ratio
        return generator | sums

    def _condition(self, items: Tensor) -> Condition:
        """Classes drawn from the mix; dropped once a sample here, before every network sees them."""
        places = counter.integers(self._params.seed, "distill/label", items, int(self._ends[-1]))
        condition = self._card.condition(torch.searchsorted(self._ends, places, right=True))
        return self._dropped("distill", items, condition)

    def _dropped(self, purpose: str, items: Tensor, condition: Condition) -> Condition:
        if self._params.label_dropout == 0 or not self._card.classes:
            return condition
        drop = counter.uniform(self._params.seed, f"{purpose}/drop", items) < self._params.label_dropout
        return condition.dropped(drop)

    @torch.no_grad()
    def _student_output(self, states: States) -> Tensor:
        return self._student(states.x, states.sigma, states.condition)  # type: ignore[no-any-return]

    def _noised(self, purpose: str, items: Tensor, x0: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """x0 + sigma·eps and sigma [N], sigma uniform over `levels`, both by item."""
        sigma = levels[counter.integers(self._params.seed, f"{purpose}/level", items, len(levels))]
        eps = counter.normal(self._params.seed, f"{purpose}/noise", items, self._shape)
        return noised(x0, sigma, eps), sigma

    def _update_generator(self, step: int, states: States, items: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's step on distribution matching and GAN; returns its outputs, detached, and figures."""
        params, condition = self._params, states.condition
        adversary = params.gan.on and step >= params.gan.start and params.gan.generator_weight > 0
        if params.dm.weight == 0 and not adversary:
            return self._student_output(states), {}  # the discriminator trains alone until gan.start
        figures: dict[str, Tensor] = {}
        with frozen(self._fake):  # until the backward pass has ended: checkpointing runs forward once more within it
            x0 = self._student_trained(states.x, states.sigma, condition)
            loss = x0.new_zeros(())
            if params.dm.weight > 0:
                direction = self.direction(x0.detach(), condition, items)
                matching = losses.distribution_matching_loss(x0, direction)
                loss = loss + params.dm.weight * matching
                figures |= {"dm_loss": matching.detach(), "dm_direction": direction.abs().mean()}
            if adversary:
                noisy, sigma = self._noised("gan-generator", items, x0, self._gan_levels)
                adversarial = losses.generator_gan_loss(self._fake.logits(noisy, sigma, condition))
                loss = loss + params.gan.generator_weight * adversarial
                figures["gan_generator_loss"] = adversarial.detach()
            (self._rollout.share * loss).backward()
        norm = optimizers.step(self._student_optimizer, params.generator_lr, params.optimizer, step, self.updates)
        self.ema.update(self._student.network, decay_at(params.ema, update=step - self._first, batch=self.states))
        figures = {name: self._rollout.share * figure for name, figure in figures.items()}
        return x0.detach(), figures | {"generator_gradient_norm": norm}

    @torch.no_grad()
    def direction(self, x0: Tensor, condition: Condition, items: Tensor) -> Tensor:
        """The distribution-matching direction at x0, from one noising shared by fake score and teacher."""
        noisy, sigma = self._noised("dm", items, x0, self._dm_levels)
        fake = self._fake.denoiser(noisy, sigma, condition)
        real = self._real_score(noisy, sigma, condition)
        return losses.distribution_matching_direction(x0, fake, real)

    def _update_fake(self, turn: int, x0: Tensor, condition: Condition, items: Tensor) -> dict[str, Tensor]:
        """The fake score's step, and the discriminator's with it, on detached student samples."""
        params = self._params
        noisy, sigma = self._fake_noised(items, x0)
        judged, count = None, len(x0)
        if params.gan.on:
            judged = self._judged(turn, x0, condition, items)
        denoised, logits = self._fake_trained(noisy, sigma, condition, judged)
        weight = self._fake.denoiser.fake_score_weight(sigma)
        matching = self._rollout.share * losses.fake_score_loss(denoised, x0, weight)
        loss, figures = params.fake_score.weight * matching, {"fake_score_loss": matching.detach()}
        if logits is not None:
            fake_logits, real_logits = logits[:count], logits[count:]
            if params.gan.r1 > 0:
                real_logits, jittered = real_logits.chunk(2)
                loss = loss + params.gan.r1 * losses.approximate_r1(real_logits, jittered)
            called_fake, called_real = losses.discriminator_gan_losses(fake_logits, real_logits)
            adversarial = self._rollout.share * called_fake + called_real  # ranks have equal shares of the real images
            loss = loss + params.gan.discriminator_weight * adversarial
            right = 0.5 * (self._rollout.share * (fake_logits < 0).float().mean() + (real_logits > 0).float().mean())
            figures |= {"gan_discriminator_loss": adversarial.detach(), "gan_discriminator_right": right}
        loss.backward()
        updates = self.updates * params.update_ratio
        norm = optimizers.step(self._fake_optimizer, params.fake_score_lr, params.optimizer, turn, updates)
        return figures | {"fake_score_gradient_norm": norm}

    def _fake_noised(self, items: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
        if self._params.fake_score.noise == "ladder":
            return self._noised("fake", items, x0, self._fake_levels)
        sigma = self._fake.denoiser.training_sigma(counter.normal(self._params.seed, "fake/level", items))
        eps = counter.normal(self._params.seed, "fake/noise", items, self._shape)
        return noised(x0, sigma, eps), sigma

    def _judged(self, turn: int, x0: Tensor, condition: Condition, items: Tensor) -> tuple[Tensor, Tensor, Condition]:
        """Noised student samples, then noised real images (and the same jittered, for R1), as one batch."""
        assert self._loader is not None  # there is one where the GAN is on
        batch = self._loader.batch(turn)
        positions = batch.positions
        real_condition = self._dropped("real", positions, self._card.condition(batch.labels))
        fake_noisy, fake_sigma = self._noised("gan-fake", items, x0, self._gan_levels)
        real_noisy, real_sigma = self._noised("gan-real", positions, batch.images, self._gan_levels)
        noisy, sigma = torch.cat([fake_noisy, real_noisy]), torch.cat([fake_sigma, real_sigma])
        conditions = condition.cat(real_condition)
        if self._params.gan.r1 > 0:
            jitter = counter.normal(self._params.seed, "gan-r1/noise", positions, self._shape)
            noisy = torch.cat([noisy, real_noisy + self._params.gan.r1_sigma * jitter])
            sigma, conditions = torch.cat([sigma, real_sigma]), conditions.cat(real_condition)
        return noisy, sigma, conditions

    # --- what the loop asks for -----------------------------------------------------------------------------------

    def epoch(self, step: int) -> int:
        """How often as many samples as the train part has images were made after `step` updates."""
        return step * self.states // self._train_images

    def warm_up(self) -> None:
        """One backward through each network without a step: DDP orders its buckets in its first."""
        if self._world.size == 1:
            return
        count = round(self._rollout.share * self.states / self._world.size)
        items = torch.arange(count, device=self._world.device)
        states = rollout.fresh(self._student, self._walkers.start(items), 0)  # a pool stays as it is
        x0 = self._student_trained(states.x, states.sigma, states.condition)
        x0.sum().backward()
        judged = self._judged(0, x0.detach(), states.condition, items) if self._params.gan.on else None
        denoised, logits = self._fake_trained(states.x, states.sigma, states.condition, judged)
        (denoised.sum() + (0 if logits is None else logits.sum())).backward()
        self._student_optimizer.zero_grad(set_to_none=True)
        self._fake_optimizer.zero_grad(set_to_none=True)

    def validate(self, step: int) -> dict[str, float]:
        """The validation distance of the averaged student; the best so far is kept."""
        if step % self._params.validation.every and step != self.updates:
            return {}
        distance = self._validation.distance(self._student, self.ema)
        if distance < self.best_distance:
            self.best_step, self.best_distance = step, distance
            raw = self._student.network.state_dict()
            if self._world.leader:
                self.best = {"ema": on_host(self.ema.tensors), "raw": on_host(raw)}
        return {"validation_distance": distance}

    def state(self) -> dict[str, Any]:
        return {
            "student": self._student.network.state_dict(),
            "ema": self.ema.tensors,
            "fake": self._fake.state_dict(),
            "student_optimizer": self._student_optimizer.state_dict(),
            "fake_optimizer": self._fake_optimizer.state_dict(),
            "rollout": self._rollout.state(),
            "best": {"step": self.best_step, "distance": self.best_distance, "weights": self.best},
        }

    def load(self, state: dict[str, Any]) -> None:
        self._student.network.load_state_dict(state["student"])
        self.ema.load(state["ema"])
        self._fake.load_state_dict(state["fake"])
        self._student_optimizer.load_state_dict(state["student_optimizer"])
        self._fake_optimizer.load_state_dict(state["fake_optimizer"])
        self._rollout.load(state["rollout"])
        best = state["best"]
        self.best_step, self.best_distance = best["step"], best["distance"]
        self.best = {which: on_host(tensors) for which, tensors in best["weights"].items()}


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Gradients flow through the module to its inputs, not to its weights."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
