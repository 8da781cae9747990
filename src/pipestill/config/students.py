"""Parameters of distillation: one entry for each student."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipestill.config.fields import (
    Count,
    ExtractorName,
    Fraction,
    MixName,
    Name,
    Positive,
    Precision,
    Rate,
    Section,
    Seed,
    Sigma,
    Weight,
    range_of_karras,
)
from pipestill.config.models import EmaParams, OptimizerParams

Rollout = Literal["fresh", "every_step", "pool"]


class DistributionMatchingParams(Section):
    """The distribution-matching gradient of DMD2 and the noise levels at which it is taken."""

    weight: Weight = 1.0
    sigma_min: Sigma = 0.002  # clip of the noise levels drawn from the ladder
    sigma_max: Sigma = 80.0
    ladder: Positive = 1000  # number of noise levels over the denoiser's range: Karras's of edm, steps of vp and flow
    trim: Fraction = 0.02  # levels trim·ladder to (1 - trim)·ladder are used (published: 20 to 980, both included)
    guidance: Weight = 1.0  # of the teacher's prediction


class GanParams(Section):
    """The diffusion GAN on an encoder's bottleneck; discriminator_weight=0 switches it off."""

    generator_weight: Weight = 3e-3
    discriminator_weight: Weight = 1e-2
    features: Literal["fake_score", "teacher"] = "fake_score"
    real: Literal["plan", "data"] = "plan"  # class mix of the real images: the student's plan, or as they come (DMD2)
    sigma_min: Sigma = 0.002
    sigma_max: Sigma = 80.0
    start: Count = 0  # generator updates before the generator sees the GAN loss
    r1: Weight = 0.0  # weight of the approximate R1 penalty (finite difference, Lin et al. 2025)
    r1_sigma: Sigma = 0.01

    @property
    def on(self) -> bool:
        return self.discriminator_weight > 0

    @model_validator(mode="after")
    def _someone_judges(self) -> Self:
        if self.generator_weight > 0 and self.discriminator_weight == 0:
            raise ValueError("generator_weight > 0 needs a trained discriminator: discriminator_weight > 0")
        return self


class FakeScoreParams(Section):
    """Training of the fake score on the student's samples; `noise` names the law of its noise levels."""

    noise: Literal["ladder", "training"] = "ladder"
    weight: Weight = 1.0


class PoolParams(Section):
    """The pool of rollout=pool: inputs of student steps that one rollout leaves for several generator updates."""

    updates: Positive = 4  # generator updates that a rollout serves: no input gets older
    uses: Positive = 1  # times that each input is trained on; outputs are always made anew


class ValidationParams(Section):
    """The validation distance during distillation; the best checkpoint is kept by it."""

    every: Positive = 50  # generator updates
    images: Positive = 270
    extractor: ExtractorName = "efficientnet_lite0"
    micro_batch: Positive = 64
    seed: Seed = 2000


class StudentParams(Section):
    """One student: DMD2 (Yin et al. 2024) with backward simulation."""

    teacher: Name
    init: Name  # the teacher, or another student whose weights start this one
    steps: Positive
    transition: Literal["euler", "renoise"] = "euler"
    spacing: Literal["karras", "trailing"] = "karras"  # trailing: the denoiser's own steps, from its last one
    sigma_max: Sigma | None = 8.0  # of Karras's noise levels, else null
    sigma_min: Sigma | None = 0.05
    rho: Annotated[float, Field(gt=0)] = 7.0
    iterations: Positive = 300  # generator updates
    update_ratio: Positive = 5  # fake-score updates a generator update
    rollout: Rollout = "every_step"
    pool: PoolParams = PoolParams()
    batch: Positive = 128  # states a turn, over all ranks; every_step rounds up to whole trajectories
    plan: MixName = "balanced"  # class mix of the labels it is trained on and validated with; follows its runs
    generator_lr: Rate = 1.5e-4
    fake_score_lr: Rate = 1.5e-4
    optimizer: OptimizerParams = OptimizerParams(betas=(0.9, 0.999), warmup=10)  # of generator and fake score
    label_dropout: Fraction = 0.1
    dm: DistributionMatchingParams = DistributionMatchingParams()
    gan: GanParams = GanParams()
    fake_score: FakeScoreParams = FakeScoreParams()
    ema: EmaParams = EmaParams(decay=0.99)
    validation: ValidationParams = ValidationParams()
    precision: Precision = "fp32"  # bf16: networks under autocast; on a GPU, fp32 products take TF32
    compile: bool = False
    checkpointing: bool = False
    deterministic: bool = True
    seed: Seed = 0
    threads: Positive = 1

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        range_of_karras(self.spacing, self.sigma_min, self.sigma_max)
        if self.dm.weight == 0 and self.gan.generator_weight == 0:
            raise ValueError("dm.weight and gan.generator_weight are both 0: the student would learn nothing")
        if self.dm.weight == 0 and self.gan.start >= self.iterations:
            raise ValueError(
                f"dm.weight is 0 and gan.start={self.gan.start}, but there are {self.iterations} iterations: "
                "the student would learn nothing"
            )
        if self.pool.uses > self.pool.updates * self.update_ratio:
            raise ValueError(f"pool.uses={self.pool.uses}: a turn would hold an input twice; raise pool.updates")
        return self


class DistillationParams(Section):
    students: dict[Name, StudentParams] = {}
