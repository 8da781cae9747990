"""How long stages will take: arithmetic over the parameters and a few measured speeds (training/trial.py).

It measures nothing itself, and reads no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from pipestill.config import Params, RunParams, StudentParams, TeacherParams, TuneParams
from pipestill.diffusion.samplers import evaluations

REPORT = 5.0  # seconds of its tables and pictures
PUBLISHING = 1.0  # seconds in which a stage checks its inputs, and writes and syncs its artefact


@dataclass(frozen=True)
class Sizes:
    """How many images there are."""

    total: int
    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class Speeds:
    """Seconds on this machine, by the number of threads where that matters; what is not known is left out."""

    start: float  # of a process that imports torch
    decode: float = 0.0  # an image of the source
    classifier: float = 0.0  # an update
    features: Mapping[int, float] = field(default_factory=dict)  # an image, in all spaces of the reference
    metrics: Mapping[int, float] = field(default_factory=dict)  # a set of metrics from features
    forward: Mapping[tuple[str, int], float] = field(default_factory=dict)  # of a model: an image and evaluation
    update: Mapping[str, float] = field(default_factory=dict)  # of a teacher or student


def threads_of(params: Params, stage: str, entry: str | None) -> int:
    """With how many threads a rank of a stage computes."""
    section = {
        "reference": params.reference,
        "train": getattr(params.teachers.get(entry or ""), "training", None),
        "tune": params.tune.get(entry or ""),
        "distill": params.distillation.students.get(entry or ""),
        "sample": params.sampling.runs.get(entry or ""),
        "evaluate": params.evaluation,
    }.get(stage)
    return int(getattr(section, "threads", 1))


class Estimate:
    """Seconds of each stage of a project, on a machine with `have` cores. `sizes` is None where nothing is known."""

    def __init__(self, params: Params, sizes: Sizes | None, speeds: Speeds, have: int) -> None:
        self.params, self.speeds, self.have = params, speeds, have
        self._sizes = sizes

    @property
    def sizes(self) -> Sizes:
        if self._sizes is None:
            raise KeyError("sizes")
        return self._sizes

    def seconds(self, stage: str, entry: str | None) -> float | None:
        """How long one stage takes; None where that is not known."""
        try:
            own = self._own(stage, entry or "")
        except KeyError:
            return None  # fetched or converted, or images, weights or a model that are not here yet
        crowded = max(1.0, self.cores(stage, entry) / self.have)  # ranks that share cores
        return self.speeds.start + PUBLISHING + crowded * own / self._ranks(stage)

    def _own(self, stage: str, entry: str) -> float:
        """Seconds of a stage's work on one rank. Raises KeyError if they are not known."""
        params = self.params
        match stage:
            case "example":
                return 0.0
            case "dataset":
                return self.sizes.total * self.speeds.decode
            case "reference":
                return self._reference()
            case "train":
                return self._train(entry, params.teachers[entry])
            case "tune":
                return self._tune(entry, params.tune[entry])
            case "distill":
                return self._distill(entry, params.distillation.students[entry])
            case "sample":
                return self._sample(params.sampling.runs[entry])
            case "evaluate":
                return self._evaluate(params.sampling.runs[entry])
            case "report":
                return REPORT
            case _:
                raise KeyError(stage)

    def cores(self, stage: str, entry: str | None) -> int:
        """How many cores it keeps busy, if there are as many."""
        return threads_of(self.params, stage, entry) * self._ranks(stage)

    def _ranks(self, stage: str) -> int:
        return int(dict(self.params.operation.ranks).get(stage, 1))  # type: ignore[call-overload]

    def _train(self, name: str, teacher: TeacherParams) -> float:
        training = teacher.training
        seconds = training.iterations * self.speeds.update[name]
        if training.validate_every:
            checks = training.iterations // training.validate_every
            seconds += checks * self.sizes.validation * self.speeds.forward[name, training.threads]
        return seconds

    def _distill(self, name: str, student: StudentParams) -> float:
        checks = student.iterations // student.validation.every
        threads = student.threads
        image = student.steps * self.speeds.forward[name, threads] + self.speeds.features[threads]
        return student.iterations * self.speeds.update[name] + checks * student.validation.images * image

    def _tune(self, name: str, tune: TuneParams) -> float:
        seconds = 0.0
        forward, features = self.speeds.forward[name, tune.threads], self.speeds.features[tune.threads]
        for _, solver in product(tune.sigma_max, tune.solvers):
            ranges = 1 if solver.steps == 1 else len(tune.sigma_min)
            seconds += ranges * tune.images * (evaluations(solver.sampler, solver.steps) * forward + features)
        return seconds

    def _sample(self, run: RunParams) -> float:
        steps = run.steps
        sampler = run.sampler
        if sampler == "native" or steps is None:
            student = self.params.distillation.students[run.model]
            sampler, steps = student.transition, student.steps
        calls = evaluations(sampler, steps) * (1 if run.guidance == 1 else 2)
        image = calls * self.speeds.forward[run.model, run.threads]
        if run.store == "features":
            image += self.speeds.features[run.threads]
        return run.images * len(run.seeds) * image

    def _evaluate(self, run: RunParams) -> float:
        threads = self.params.evaluation.threads
        measured = run.images * self.speeds.features[threads] if run.store == "images" else 0.0
        return len(run.seeds) * (measured + self.speeds.metrics[threads])

    def _reference(self) -> float:
        reference = self.params.reference
        floors = len(reference.floor.counts) * len(reference.floor.plans) * reference.floor.draws
        seconds = self.sizes.total * self.speeds.features[reference.threads]
        if floors:
            seconds += floors * self.speeds.metrics[reference.threads]
        if "classifier" in reference.protocol.extractors:
            seconds += reference.classifier.iterations * self.speeds.classifier
        return seconds


def makespan(seconds: Sequence[float], cores: Sequence[int], needs: Sequence[Sequence[int]], have: int) -> float:
    """When the last of several jobs ends, if each starts once those that it `needs` have ended and cores are free.

    Jobs are taken in their order; one that wants more cores than there are gets all of them.
    """
    ends: dict[int, float] = {}
    now, waiting, running = 0.0, list(range(len(seconds))), list[int]()
    while waiting or running:
        free = have - sum(min(cores[job], have) for job in running)
        for job in list(waiting):
            ready = all(ends.get(other, now + 1) <= now and other not in running for other in needs[job])
            if ready and min(cores[job], have) <= free:
                free -= min(cores[job], have)
                ends[job] = now + seconds[job]
                running.append(job)
                waiting.remove(job)
        if not running:
            raise ValueError("jobs wait for each other")
        now = min(ends[job] for job in running)
        running = [job for job in running if ends[job] > now]
    return now
