"""Parameters of networks, teachers and the tuning of their samplers."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from pipestill.config.denoisers import EdmParams, TrainedDenoiserParams, TrainedEdmParams
from pipestill.config.fields import (
    Beta,
    Count,
    ExtractorName,
    Fraction,
    MixName,
    Name,
    Once,
    Positive,
    Precision,
    Rate,
    Section,
    Seed,
    Sigma,
    Weight,
    ordered,
)


class NetworkParams(Section):
    """A Diffusers UNet2DModel; EDM's ADM layout in small."""

    channels: tuple[Positive, ...] = (16, 32)
    layers: Positive = 2  # residual blocks a level
    attention: tuple[bool, ...] = (False, False)  # one a level
    head_channels: Positive = 8
    norm_groups: Positive = 8
    dropout: Fraction = 0.0

    def misfit(self, resolution: int) -> str | None:
        """Why the network cannot take images of this side; None where it can."""
        levels = len(self.channels)
        if resolution % 2 ** (levels - 1) == 0:
            return None
        return (
            f"a network of {levels} levels halves its images {levels - 1} times, and {resolution} pixels cannot be: "
            f"use a resolution that {2 ** (levels - 1)} divides, or fewer network.channels"
        )

    @model_validator(mode="after")
    def _one_flag_a_level(self) -> Self:
        if len(self.attention) != len(self.channels):
            raise ValueError("attention needs one true or false a level, as many as channels")
        return self


class EmaParams(Section):
    """Exponential moving average of the weights: a half-life in images, or a fixed decay an update."""

    kind: Literal["half-life", "decay"] = "decay"
    half_life: Positive = 50_000  # images, EDM's form
    ramp_up: Weight = 0.05  # half-life is at most this share of the images seen; 0 switches the ramp off
    decay: Beta = 0.995
    warmup: bool = True  # of kind=decay: at most (1 + t) / (10 + t) after t updates, so that short trainings work
    sync_every: Count = 0  # updates between copies of the first rank's average to all others; 0 switches them off


class OptimizerParams(Section):
    """AdamW with linear warm-up and a schedule."""

    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: Weight = 0.01
    warmup: Count = 50  # updates
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    decay_from: Fraction = 0.5  # share of the run after which the rate decays to 0
    clip: Weight = 10.0  # gradient norm; 0 switches clipping off


class TrainingParams(Section):
    """Training a denoiser: noise law and weight are those of its adapter."""

    iterations: Positive = 2000
    batch: Positive = 128  # images an update, over all ranks and accumulation steps
    accumulation: Positive = 1
    learning_rate: Rate = 2e-3
    optimizer: OptimizerParams = OptimizerParams()
    ema: EmaParams = EmaParams()
    label_dropout: Fraction = 0.1
    balanced: bool = False  # batches have every class equally often, whatever its number of images
    precision: Precision = "fp32"  # bf16: networks under autocast; on a GPU, fp32 products take TF32
    compile: bool = False
    checkpointing: bool = False
    deterministic: bool = True
    validate_every: Count = 200  # updates; 0 switches it off
    seed: Seed = 0
    threads: Positive = 1


class TeacherParams(Section):
    """A teacher that is trained: from random weights, or from another model's raw ones (`start: models/NAME`)."""

    start: Annotated[str, StringConstraints(pattern=r"^(dataset|models/[a-z0-9][a-z0-9-]*)$")] = "dataset"
    network: NetworkParams | None = NetworkParams()  # null where `start` is a model, which brings its own
    denoiser: TrainedDenoiserParams = TrainedEdmParams()
    training: TrainingParams = TrainingParams()

    @property
    def begins_with(self) -> str | None:
        """The model whose weights it starts from; None for random ones."""
        return self.start.removeprefix("models/") if self.start != "dataset" else None

    @model_validator(mode="after")
    def _one_network(self) -> Self:
        if (self.network is None) != (self.begins_with is not None):
            raise ValueError("network belongs to a teacher that starts from random weights (start: dataset) alone")
        return self


class NativeParams(Section):
    """How a converted student was trained to be sampled."""

    steps: Positive
    transition: Literal["euler", "renoise"] = "renoise"
    sigma_max: Sigma = 80.0
    sigma_min: Sigma = 0.002
    rho: Annotated[float, Field(gt=0)] = 7.0

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        ordered(self.sigma_min, self.sigma_max)
        return self


class ConvertParams(Section):
    """A model made from a fetched file: EDM's pickle, or a checkpoint of DMD2's."""

    input: Name  # the entry of `fetched`
    file: str  # its path there
    network: str = "ema"  # which: a key of the pickle, or the prefix of its tensors in a checkpoint
    denoiser: EdmParams = EdmParams()
    native: NativeParams | None = None  # of a student; null for a teacher


class SolverParams(Section):
    """A sampler with its number of steps."""

    sampler: Literal["euler", "heun", "2m", "renoise"]
    steps: Positive


class TuneParams(Section):
    """The choice of each sampler's sigma range by the validation distance."""

    solvers: Annotated[tuple[SolverParams, ...], Once]
    sigma_max: Annotated[tuple[Sigma, ...], Once] = (80.0, 20.0, 8.0)
    sigma_min: Annotated[tuple[Sigma, ...], Once] = (0.002, 0.05, 0.15)
    rho: Annotated[float, Field(gt=0)] = 7.0
    extractor: ExtractorName = "efficientnet_lite0"
    images: Positive = 270
    plan: MixName = "balanced"  # class mix of samples and validation part; follows the runs
    micro_batch: Positive = 64
    seed: Seed = 1000
    threads: Positive = 1
