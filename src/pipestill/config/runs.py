"""Parameters of sampling runs, and of operation, which never decides a result."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from pipestill.config.fields import (
    ClassChoice,
    Count,
    Fraction,
    MixName,
    Name,
    Once,
    PathText,
    Positive,
    Precision,
    SamplerName,
    Section,
    Seed,
    Sigma,
    Weight,
    ordered,
)

RankedStage = Literal["train", "distill", "sample", "evaluate", "reference"]


class ChurnParams(Section):
    """EDM's stochastic sampler (Karras et al. 2022, algorithm 2)."""

    churn: Weight = 40.0
    s_min: Weight = 0.05
    s_max: Sigma = 50.0
    noise: Weight = 1.003


def mix_of(plan: str) -> MixName:
    """The class mix of a plan; of one without a mix of its own, that of the data."""
    return "balanced" if plan in ("balanced", "drawn") else "data"


class RunParams(Section):
    """One sampling run. `sigmas` names where its range comes from: `models/<model>` or `tuned/<teacher>`."""

    model: Name
    weights: Literal["ema", "raw"] = "ema"
    sampler: SamplerName = "native"
    steps: Positive | None = None  # native: the model's own number
    sigmas: Annotated[str, StringConstraints(pattern=r"^(models|tuned)/[a-z0-9][a-z0-9-]*$")]
    sigma_max: Sigma | None = None
    sigma_min: Sigma | None = None
    rho: Annotated[float, Field(gt=0)] = 7.0
    spacing: Literal["karras", "trailing", "leading", "linspace"] = "karras"  # others: steps of the denoiser's schedule
    clip: bool = False  # x0 is clamped to [-1, 1] at each step (DDPM's clip_sample)
    churn: ChurnParams | None = None
    guidance: Weight = 1.0
    plan: Literal["balanced", "data", "drawn", "listed", "none"] = "balanced"
    classes: tuple[ClassChoice, ...] = ()  # of plan=listed: by name, or by number from 0
    images: Positive = 500  # for each seed
    store: Literal["images", "features"] = "images"  # features: measured where they are made, no image is written
    extractors: Literal["dataset", "reference"] = "dataset"  # follows `store`: whose extractors measure
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), Once] = (0,)
    micro_batch: Positive = 64
    precision: Precision = "fp32"  # bf16: networks under autocast; on a GPU, fp32 products take TF32
    threads: Positive = 1

    @property
    def mix(self) -> MixName:
        """The class mix whose floor stands beside the run."""
        return mix_of(self.plan)

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.sampler != "native" and self.steps is None:
            raise ValueError(f"sampler {self.sampler} needs steps")
        if self.sigmas.startswith("tuned/") and self.sampler not in ("euler", "heun", "2m", "renoise"):
            raise ValueError(f"sampler {self.sampler} has no tuned sigma range: use sigmas=models/{self.model}")
        if (self.plan == "listed") != bool(self.classes):
            raise ValueError("plan=listed and classes belong together")
        if (self.store == "features") != (self.extractors == "reference"):
            raise ValueError("store=features and extractors=reference belong together")
        if self.sigma_min is not None and self.sigma_max is not None:
            ordered(self.sigma_min, self.sigma_max)
        if self.spacing != "karras" and (self.sigmas.startswith("tuned/") or self.sigma_max or self.sigma_min):
            raise ValueError(
                f"spacing={self.spacing} takes the denoiser's own steps: no sigma_max, sigma_min or tuned/"
            )
        if self.sampler in ("native", "ddim-linear-alpha") and self.spacing != "karras":
            raise ValueError(f"sampler={self.sampler} has noise levels of its own: leave spacing out")
        if self.sampler == "ddim-linear-alpha" and (self.sigma_max or self.sigma_min):
            raise ValueError("sampler=ddim-linear-alpha has noise levels of its own: leave sigma_max and sigma_min out")
        if (self.sampler == "heun-churn") != (self.churn is not None):
            raise ValueError("sampler=heun-churn and churn belong together")
        return self


class SamplingParams(Section):
    runs: dict[Name, RunParams] = {}

    @model_validator(mode="after")
    def _floor_is_reserved(self) -> Self:
        if "floor" in self.runs:
            raise ValueError("'floor' names the real-against-real figures and cannot be a run")
        return self


class PreviewParams(Section):
    """Pictures during a training, made by all ranks together; they change nothing of the training."""

    share: Fraction = 0.02  # of the training's time that previews may take; 0 switches them off, 1 is no limit
    every: Count = 0  # updates or epochs between previews, as far as `share` allows; 0: 40 previews per training
    unit: Literal["updates", "epochs"] = "updates"
    classes: Annotated[tuple[ClassChoice, ...], Once] = ()  # by name or number, a row each; empty: up to `rows` of them
    rows: Positive = 10
    each: Positive = 4  # pictures a row
    seed: Seed = 0
    patience: Annotated[float, Field(gt=0)] = 30.0  # seconds that a file may take before its file system counts as hung


class OperationParams(Section):
    """What never decides a result: ranks, devices, caches, trackers, previews, time limits."""

    ranks: dict[RankedStage, Positive] = {}
    nodes: dict[RankedStage, Positive] = {}  # that share the ranks
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cache: Literal["device", "host", "none"] = "host"
    workers: Positive = 2  # processes that decode images
    save_every: Annotated[float, Field(gt=0)] = 60.0  # seconds between saved states; seldomer where saving takes long
    keep_states: Positive = 2
    preview: PreviewParams = PreviewParams()
    log_every: Positive = 20  # updates between figures taken from the device, logged and checked for NaN
    trackers: Annotated[tuple[Literal["tensorboard", "mlflow", "wandb"], ...], Once] = ()
    timeout: Annotated[float, Field(gt=0)] = 600.0  # seconds a collective may take
    margin: Weight = 60.0  # seconds before its job's end in which a stage stops; more where saving takes long
    container: PathText | None = None  # Apptainer image in which stages over ranks run
    record: bool = True  # let Snakemake's end call `pipestill record`
