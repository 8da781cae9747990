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
    """Seconds on this machine; networks by the name of a model."""

    start: float  # of a process that imports torch
    decode: float = 0.0  # an image of the source
    features: float = 0.0  # an image, in all spaces of the reference
    classifier: float = 0.0  # an update
    metrics: float = 0.0  # a set of metrics from features
    forward: Mapping[str, float] = field(default_factory=dict)  # an image and evaluation
    update: Mapping[str, float] = field(default_factory=dict)  # of a teacher or student


class Estimate:
    """Seconds of each stage of a project."""

    def __init__(self, params: Params, sizes: Sizes, speeds: Speeds) -> None:
        self.params, self.sizes, self.speeds = params, sizes, speeds

    def seconds(self, stage: str, entry: str | None) -> float | None:
        """How long one stage takes; None where that is not known."""
        try:
            own = self._own(stage, entry or "")
        except KeyError:
            return None  # fetched or converted, or a model whose network is not known yet
        return self.speeds.start + PUBLISHING + own / self._ranks(stage)

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
        """How many cores it keeps busy."""
        params = self.params
        section = {
            "reference": params.reference,
            "train": getattr(params.teachers.get(entry or ""), "training", None),
            "tune": params.tune.get(entry or ""),
            "distill": params.distillation.students.get(entry or ""),
            "sample": params.sampling.runs.get(entry or ""),
            "evaluate": params.evaluation,
        }.get(stage)
        return int(getattr(section, "threads", 1)) * self._ranks(stage)

    def _ranks(self, stage: str) -> int:
        return int(dict(self.params.operation.ranks).get(stage, 1))  # type: ignore[call-overload]

    def _train(self, name: str, teacher: TeacherParams) -> float:
        training = teacher.training
        seconds = training.iterations * self.speeds.update[name]
        if training.validate_every:
            checks = training.iterations // training.validate_every
            seconds += checks * self.sizes.validation * self.speeds.forward[name]
        return seconds

    def _distill(self, name: str, student: StudentParams) -> float:
        checks = student.iterations // student.validation.every
        image = student.steps * self.speeds.forward[name] + self.speeds.features
        return student.iterations * self.speeds.update[name] + checks * student.validation.images * image

    def _tune(self, name: str, tune: TuneParams) -> float:
        seconds = 0.0
        for _, solver in product(tune.sigma_max, tune.solvers):
            ranges = 1 if solver.steps == 1 else len(tune.sigma_min)
            image = evaluations(solver.sampler, solver.steps) * self.speeds.forward[name] + self.speeds.features
            seconds += ranges * tune.images * image
        return seconds

    def _sample(self, run: RunParams) -> float:
        steps = run.steps
        sampler = run.sampler
        if sampler == "native" or steps is None:
            student = self.params.distillation.students[run.model]
            sampler, steps = student.transition, student.steps
        calls = evaluations(sampler, steps) * (1 if run.guidance == 1 else 2)
        image = calls * self.speeds.forward[run.model] + (self.speeds.features if run.store == "features" else 0)
        return run.images * len(run.seeds) * image

    def _evaluate(self, run: RunParams) -> float:
        measured = run.images if run.store == "images" else 0
        return len(run.seeds) * (measured * self.speeds.features + self.speeds.metrics)

    def _reference(self) -> float:
        reference = self.params.reference
        floors = len(reference.floor.counts) * len(reference.floor.plans) * reference.floor.draws * self.speeds.metrics
        return (
            reference.classifier.iterations * self.speeds.classifier + self.sizes.total * self.speeds.features + floors
        )


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
