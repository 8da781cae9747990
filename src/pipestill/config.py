"""Parameters: typed, frozen, checked. `params.yaml` goes in, validated objects come out, one section a stage.

Only what decides a result stands in a stage's section (and so in manifests, resume keys and DVC's `params:`);
`operation` holds the rest. This module reads parameter files and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from pipestill.errors import InputError, nearest
from pipestill.explain import explain

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]*$")]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Sigma = Annotated[float, Field(gt=0, le=1e6)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Beta = Annotated[float, Field(ge=0, lt=1)]

ExtractorName = Literal["classifier", "efficientnet_lite0", "inception"]
SamplerName = Literal["native", "euler", "heun", "heun-churn", "2m", "renoise"]
Precision = Literal["fp32", "bf16"]


class Section(BaseModel):
    """A frozen group of parameters; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def plain(self) -> dict[str, Any]:
        """The section as plain JSON values, the form that manifests and keys hold."""
        return self.model_dump(mode="json")


class ExampleParams(Section):
    """An embedded data set, written out as a folder of PNGs by class."""

    kind: Literal["digits", "textures"]
    patch: Literal[16, 32] = 16  # textures: side of a patch, pixels
    stride: Positive = 8  # textures: step between training patches, pixels


class SplitParams(Section):
    """How images are split into train, validation and test; `folder` takes the source's own top-level folders."""

    by: Literal["fraction", "folder", "none"] = "fraction"
    validation: Fraction = 0.15
    test: Fraction = 0.30
    seed: Seed = 0

    @model_validator(mode="after")
    def _some_left_to_train(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation + test must leave something to train on (their sum is below 1)")
        return self


class DataParams(Section):
    """The dataset stage: where the images are and how they are stored."""

    path: str
    format: Literal["folder", "edm", "npz", "lmdb"] = "folder"
    resolution: Annotated[int, Field(ge=4, le=4096)]
    color: Literal["grey", "rgb"] = "rgb"
    transform: Literal["none", "center-crop", "center-crop-adm"] = "center-crop"
    filter: Literal["box", "bilinear", "bicubic", "lanczos"] = "box"
    on_bad: Literal["refuse", "set-aside"] = "refuse"
    labels: bool = True
    split: SplitParams = SplitParams()
    near_duplicate_bits: Annotated[int, Field(ge=0, le=16)] = 2  # Hamming distance of 64-bit difference hashes
    images_per_value: Positive = 85


class ClassifierParams(Section):
    """The small classifier whose penultimate features and predictions judge class-conditional samples."""

    channels: tuple[Positive, ...] = (32, 64)
    features: Positive = 64
    iterations: Positive = 600
    batch: Positive = 128
    learning_rate: Rate = 2e-3
    seed: Seed = 0


class ProtocolParams(Section):
    """How figures are measured; the reference artefact carries it to whoever measures against it."""

    extractors: tuple[ExtractorName, ...] = ("classifier", "efficientnet_lite0")
    inception_weights: str | None = None  # path of torch-fidelity's weights file, for the `inception` extractor
    kid_subsets: Positive = 50
    kid_subset_size: Positive = 100
    neighbours: Positive = 3  # k of improved precision and recall
    seed: Seed = 0


class FloorParams(Section):
    """Real-against-real figures: class-stratified draws from train, measured against test, at the counts in use."""

    counts: tuple[Positive, ...] = (500,)
    draws: Positive = 5


class ReferenceParams(Section):
    protocol: ProtocolParams = ProtocolParams()
    classifier: ClassifierParams = ClassifierParams()
    floor: FloorParams = FloorParams()
    statistics: str | None = None  # an EDM npz with mu and sigma, read for the `inception` extractor
    batch: Positive = 256
    threads: Positive = 1


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


class DenoiserParams(Section):
    """The adapter between network and sampler coordinates (design: x = x0 + sigma * eps)."""

    kind: Literal["edm"] = "edm"
    sigma_data: Sigma = 0.5
    sigma_min: Sigma = 0.002
    sigma_max: Sigma = 80.0
    p_mean: float = -1.2  # training noise: ln sigma ~ N(p_mean, p_std²)
    p_std: Annotated[float, Field(gt=0)] = 1.2


class EmaParams(Section):
    """Exponential moving average of the weights: a half-life in images, or a fixed decay an update."""

    kind: Literal["half-life", "decay"] = "decay"
    half_life: Positive = 50_000  # images, EDM's form
    ramp_up: Weight = 0.05  # half-life is at most this share of the images seen; 0 switches the ramp off
    decay: Beta = 0.995


class OptimizerParams(Section):
    """AdamW with linear warm-up and a schedule."""

    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: Weight = 0.01
    warmup: Count = 50  # updates
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    decay_from: Fraction = 0.5  # share of the run after which the rate decays to 0
    clip: Weight = 10.0  # gradient norm; 0 switches clipping off


class TrainingParams(Section):
    """Training a denoiser with the EDM loss (Karras et al. 2022, table 1)."""

    iterations: Positive = 2000
    batch: Positive = 128  # images an update, over all ranks and accumulation steps
    accumulation: Positive = 1
    learning_rate: Rate = 2e-3
    optimizer: OptimizerParams = OptimizerParams()
    ema: EmaParams = EmaParams()
    label_dropout: Fraction = 0.1
    precision: Precision = "fp32"  # bf16: networks under autocast; on a GPU, fp32 products take TF32
    compile: bool = False
    checkpointing: bool = False
    deterministic: bool = True
    validate_every: Count = 200  # updates; 0 switches it off
    seed: Seed = 0
    threads: Positive = 1


class TeacherParams(Section):
    source: Literal["train"] = "train"
    network: NetworkParams = NetworkParams()
    denoiser: DenoiserParams = DenoiserParams()
    training: TrainingParams = TrainingParams()


class SolverParams(Section):
    """A sampler with its number of steps."""

    sampler: Literal["euler", "heun", "2m", "renoise"]
    steps: Positive


class TuneParams(Section):
    """The choice of each sampler's sigma range by the validation distance."""

    solvers: tuple[SolverParams, ...]
    sigma_max: tuple[Sigma, ...] = (80.0, 20.0, 8.0)
    sigma_min: tuple[Sigma, ...] = (0.002, 0.05, 0.15)
    rho: Annotated[float, Field(gt=0)] = 7.0
    extractor: ExtractorName = "efficientnet_lite0"
    images: Positive = 270
    micro_batch: Positive = 64
    seed: Seed = 1000
    threads: Positive = 1


class DistributionMatchingParams(Section):
    """The distribution-matching gradient of DMD2 and the noise levels at which it is taken."""

    weight: Weight = 1.0
    sigma_min: Sigma = 0.002  # clip of the noise levels drawn from the Karras ladder
    sigma_max: Sigma = 80.0
    ladder: Positive = 1000  # number of Karras sigmas between the denoiser's sigma_min and sigma_max
    trim: Fraction = 0.02  # share of the ladder left out at both ends (published: 20 to 980 of 1000)
    guidance: Weight = 1.0  # of the teacher's prediction


class GanParams(Section):
    """The diffusion GAN on an encoder's bottleneck; discriminator_weight=0 switches it off."""

    generator_weight: Weight = 3e-3
    discriminator_weight: Weight = 1e-2
    features: Literal["fake_score", "teacher"] = "fake_score"
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


class ValidationParams(Section):
    """The validation distance during distillation; the best checkpoint is kept by it."""

    every: Positive = 50  # generator updates
    images: Positive = 270
    extractor: ExtractorName = "efficientnet_lite0"
    micro_batch: Positive = 64
    seed: Seed = 2000


def _ordered(sigma_min: float, sigma_max: float) -> None:
    if sigma_min > sigma_max:
        raise ValueError(f"sigma_min={sigma_min} lies above sigma_max={sigma_max}")


class StudentParams(Section):
    """One student: DMD2 (Yin et al. 2024) with backward simulation."""

    teacher: Name
    init: Name  # the teacher, or another student whose weights start this one
    steps: Positive
    transition: Literal["euler", "renoise"] = "euler"
    sigma_max: Sigma = 8.0
    sigma_min: Sigma = 0.05
    rho: Annotated[float, Field(gt=0)] = 7.0
    iterations: Positive = 300  # generator updates
    update_ratio: Positive = 5  # fake-score updates a generator update
    rollout: Literal["fresh", "every_step"] = "every_step"
    batch: Positive = 128  # states a turn, over all ranks; every_step rounds up to whole trajectories
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
        _ordered(self.sigma_min, self.sigma_max)
        if self.dm.weight == 0 and self.gan.generator_weight == 0:
            raise ValueError("dm.weight and gan.generator_weight are both 0: the student would learn nothing")
        return self


class DistillationParams(Section):
    students: dict[Name, StudentParams] = {}


class ChurnParams(Section):
    """EDM's stochastic sampler (Karras et al. 2022, algorithm 2)."""

    churn: Weight = 40.0
    s_min: Weight = 0.05
    s_max: Sigma = 50.0
    noise: Weight = 1.003


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
    churn: ChurnParams | None = None
    guidance: Weight = 1.0
    plan: Literal["balanced", "data", "listed", "none"] = "balanced"
    classes: tuple[Count, ...] = ()
    images: Positive = 500  # for each seed
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    micro_batch: Positive = 64
    precision: Precision = "fp32"  # bf16: networks under autocast; on a GPU, fp32 products take TF32
    threads: Positive = 1

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.sampler != "native" and self.steps is None:
            raise ValueError(f"sampler {self.sampler} needs steps")
        if self.sigmas.startswith("tuned/") and self.sampler not in ("euler", "heun", "2m", "renoise"):
            raise ValueError(f"sampler {self.sampler} has no tuned sigma range: use sigmas=models/{self.model}")
        if (self.plan == "listed") != bool(self.classes):
            raise ValueError("plan=listed and classes belong together")
        if self.sigma_min is not None and self.sigma_max is not None:
            _ordered(self.sigma_min, self.sigma_max)
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


class EvaluationParams(Section):
    batch: Positive = 256
    threads: Positive = 1


class ReportParams(Section):
    title: str = "pipestill"
    grid_rows: Positive = 10
    grid_columns: Positive = 10


class OperationParams(Section):
    """What never decides a result: ranks, devices, caches, trackers, previews, time limits."""

    ranks: dict[Literal["train", "distill", "sample", "evaluate", "reference"], Positive] = {}
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cache: Literal["device", "host", "none"] = "host"
    workers: Positive = 2  # processes that decode images
    save_every: Annotated[float, Field(gt=0)] = 60.0  # seconds between saved states; seldomer where saving takes long
    keep_states: Positive = 2
    preview_every: Count = 0  # updates between sample grids; 0 switches them off
    log_every: Positive = 20  # updates between figures taken from the device, logged and checked for NaN
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    timeout: Annotated[float, Field(gt=0)] = 600.0  # seconds a collective may take
    record: bool = True  # let Snakemake's end call `pipestill record`


class Params(Section):
    """Everything: the whole of params.yaml."""

    examples: dict[Name, ExampleParams] = {}
    data: DataParams
    reference: ReferenceParams = ReferenceParams()
    teachers: dict[Name, TeacherParams]
    tune: dict[Name, TuneParams] = {}
    distillation: DistillationParams = DistillationParams()
    sampling: SamplingParams = SamplingParams()
    evaluation: EvaluationParams = EvaluationParams()
    report: ReportParams = ReportParams()
    operation: OperationParams = OperationParams()

    @model_validator(mode="after")
    def _names_refer(self) -> Self:
        students = self.distillation.students
        clash = set(self.teachers) & set(students)
        if clash:
            raise ValueError(f"'{min(clash)}' names both a teacher and a student")
        for name, teacher in self.teachers.items():
            misfit = teacher.network.misfit(self.data.resolution)
            if misfit is not None:
                raise ValueError(f"teachers.{name}: {misfit}")
        if not self.data.labels:
            self._nothing_asks_for_classes()
        for name in self.tune:
            _known(f"tune.{name}", name, self.teachers, "teacher")
            if not any(run.sigmas == f"tuned/{name}" for run in self.sampling.runs.values()):
                raise ValueError(f"tune.{name}: no run has sigmas=tuned/{name}, so nothing would use it")
        for name, student in students.items():
            where = f"distillation.students.{name}"
            _known(f"{where}.teacher", student.teacher, self.teachers, "teacher")
            _known(f"{where}.init", student.init, [*self.teachers, *students], "teacher or student")
        for name, run in self.sampling.runs.items():
            where = f"sampling.runs.{name}"
            _known(f"{where}.model", run.model, [*self.teachers, *students], "model")
            kind, _, source = run.sigmas.partition("/")
            if kind == "tuned":
                _known(f"{where}.sigmas", source, self.tune, "entry of tune")
                tuned = [(solver.sampler, solver.steps) for solver in self.tune[source].solvers]
                if (run.sampler, run.steps) not in tuned:
                    raise ValueError(f"{where}: {run.sampler} at {run.steps} steps is not in tune.{source}.solvers")
            if source != run.model:
                raise ValueError(f"{where}.sigmas: {run.sigmas} belongs to another model than {run.model}")
            if run.images not in self.reference.floor.counts:
                raise ValueError(
                    f"{where}.images: {run.images} is not among reference.floor.counts "
                    f"{list(self.reference.floor.counts)}: leave those out of pipestill config, they follow the runs"
                )
        return self

    def _nothing_asks_for_classes(self) -> None:
        if "classifier" in self.reference.protocol.extractors:
            raise ValueError(
                "data.labels=false leaves no classes: take classifier out of reference.protocol.extractors"
            )
        for name, run in self.sampling.runs.items():
            if run.plan != "none":
                raise ValueError(f"sampling.runs.{name}.plan={run.plan}: data.labels=false leaves no classes, use none")


def _known(where: str, name: str, known: Mapping[str, Any] | Sequence[str], what: str) -> None:
    if name not in known:
        raise ValueError(f"{where}: '{name}' is no {what}{nearest(name, known)}")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML 1.2's floats: 1e-4 is a number (PyYAML alone reads it as text). In C where PyYAML was built so."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """YAML as parameter files and `key=value` overrides use it. Raises InputError where it cannot be read."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"not readable as YAML: {' '.join(str(error).split())}") from error


def same(found: Any, stated: Any) -> bool:
    """Whether another reader of YAML found what a parameter file states; one of YAML 1.1 takes 2e-05 for a text."""
    if isinstance(found, Mapping) and isinstance(stated, Mapping):
        return found.keys() == stated.keys() and all(same(found[key], stated[key]) for key in stated)
    if isinstance(found, list) and isinstance(stated, list):
        return len(found) == len(stated) and all(map(same, found, stated))
    return bool(found == stated) or (isinstance(found, str) and parse_yaml(found) == stated)


def load(path: Path, overrides: Sequence[str] = ()) -> Params:
    """Reads and checks a parameter file, `key.name=value` overrides applied. Raises InputError."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InputError(f"{path} cannot be read ({reason}): write one with pipestill config") from error
    body = parse_yaml(text)
    if not isinstance(body, dict):
        raise InputError(f"{path} holds no parameters: write it anew with pipestill config")
    for override in overrides:
        _apply(body, override)
    return check(body, str(path))


def _apply(body: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise InputError(f"'{override}' is no override: write key.name=value")
    *parents, last = key.split(".")
    node = body
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise InputError(f"{key}: '{parent}' has no parameters below it")
    node[last] = parse_yaml(value)


Checked = TypeVar("Checked", bound=Section)


def check(body: Mapping[str, Any], where: str = "parameters") -> Params:
    """Validates a plain mapping. Raises InputError naming each wrong key, its allowed range and the nearest name."""
    return check_section(Params, body, where)


def check_section(section: type[Checked], body: Mapping[str, Any], where: str) -> Checked:
    """Validates one section's plain mapping; see `check`."""
    try:
        return section.model_validate(body)
    except ValidationError as error:
        lines = [explain(section, problem) for problem in error.errors(include_url=False)]
        raise InputError(f"{where}: " + "; ".join(lines)) from None
