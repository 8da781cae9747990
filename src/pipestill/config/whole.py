"""All parameters together, and what must hold between the sections for the pipeline to run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import PurePosixPath

from pipestill.config.data import DataParams, ExampleParams, FetchParams
from pipestill.config.fields import Name, Section
from pipestill.config.measuring import EvaluationParams, ReferenceParams, ReportParams
from pipestill.config.models import ConvertParams, TeacherParams, TuneParams
from pipestill.config.runs import OperationParams, RunParams, SamplingParams
from pipestill.config.students import DistillationParams
from pipestill.errors import nearest


class Params(Section):
    """Everything: the whole of params.yaml."""

    examples: dict[Name, ExampleParams] = {}
    fetched: dict[Name, FetchParams] = {}
    data: DataParams
    converted: dict[Name, ConvertParams] = {}
    reference: ReferenceParams = ReferenceParams()
    teachers: dict[Name, TeacherParams]
    tune: dict[Name, TuneParams] = {}
    distillation: DistillationParams = DistillationParams()
    sampling: SamplingParams = SamplingParams()
    evaluation: EvaluationParams = EvaluationParams()
    report: ReportParams = ReportParams()
    operation: OperationParams = OperationParams()

    @property
    def models(self) -> tuple[str, ...]:
        """Names of all models: those that are converted, teachers, students."""
        return (*self.converted, *self.teachers, *self.distillation.students)

    @property
    def example(self) -> str | None:
        """The entry of `examples` in whose folder `data.path` lies; None if it lies elsewhere."""
        place = PurePosixPath(os.path.normpath(self.data.path))
        return next((name for name in self.examples if place.is_relative_to(f"data/{name}")), None)


def contradictions(params: Params) -> Iterator[str]:
    """What the sections say against each other, one line each: the pipeline could not run with it.

    A stage that is run by hand reads one section, so it is not refused for these.
    """
    yield from _ambiguous(params)
    yield from _not_fetched(params)
    yield from _teachers(params)
    if not params.data.labels:
        yield from _asks_for_classes(params)
    yield from _tune(params)
    models, teachers = params.models, [*params.converted, *params.teachers]
    for name, student in params.distillation.students.items():
        where = f"distillation.students.{name}"
        yield from _unknown(f"{where}.teacher", student.teacher, teachers, "teacher")
        yield from _unknown(f"{where}.init", student.init, models, "model")
    for name, run in params.sampling.runs.items():
        yield from _run(params, f"sampling.runs.{name}", run, models)


def _ambiguous(params: Params) -> Iterator[str]:
    kinds: dict[str, Mapping[str, Section]] = {
        "converted model": params.converted,
        "teacher": params.teachers,
        "student": params.distillation.students,
    }
    for (first, own), (second, other) in combinations(kinds.items(), 2):
        for name in sorted(set(own) & set(other)):
            yield f"'{name}' names both a {first} and a {second}"


def _not_fetched(params: Params) -> Iterator[str]:
    """Entries and files of `fetched` that are referred to but do not exist."""
    for name, made in params.converted.items():
        where = f"converted.{name}"
        yield from _unknown(f"{where}.input", made.input, params.fetched, "entry of fetched")
        if made.input in params.fetched:
            files = [file.path for file in params.fetched[made.input].files]
            yield from _unknown(f"{where}.file", made.file, files, "fetched file")
    kind, _, source = params.reference.files.partition("/")
    if kind == "fetched":
        yield from _unknown("reference.files", source, params.fetched, "entry of fetched")


def _teachers(params: Params) -> Iterator[str]:
    for name, teacher in params.teachers.items():
        where = f"teachers.{name}"
        if teacher.begins_with is not None:
            yield from _unknown(f"{where}.start", teacher.begins_with, params.models, "model")
            yield from _circle(params, name)
        elif teacher.network is not None and (misfit := teacher.network.misfit(params.data.resolution)):
            yield f"{where}: {misfit}"


def _circle(params: Params, name: str) -> Iterator[str]:
    """Teachers that start from one another in a circle could none of them begin."""
    seen, here = [name], params.teachers[name].begins_with
    while here in params.teachers:
        if here in seen:
            yield f"teachers.{name}.start goes round in a circle: {' -> '.join((*seen, here))}"
            return
        seen.append(here)
        here = params.teachers[here].begins_with


def _asks_for_classes(params: Params) -> Iterator[str]:
    if "classifier" in params.reference.protocol.extractors:
        yield "data.labels=false leaves no classes: take classifier out of reference.protocol.extractors"
    for name, run in params.sampling.runs.items():
        if run.plan != "none":
            yield f"sampling.runs.{name}.plan={run.plan}: data.labels=false leaves no classes, use none"


def _tune(params: Params) -> Iterator[str]:
    for name in params.tune:
        yield from _unknown(f"tune.{name}", name, [*params.converted, *params.teachers], "teacher")
        if not any(run.sigmas == f"tuned/{name}" for run in params.sampling.runs.values()):
            yield f"tune.{name}: no run has sigmas=tuned/{name}, so nothing would use it"


def _run(params: Params, where: str, run: RunParams, models: Sequence[str]) -> Iterator[str]:
    yield from _unknown(f"{where}.model", run.model, models, "model")
    kind, _, source = run.sigmas.partition("/")
    if kind == "tuned":
        yield from _unknown(f"{where}.sigmas", source, params.tune, "entry of tune")
        tuned = (
            [(solver.sampler, solver.steps) for solver in params.tune[source].solvers] if source in params.tune else []
        )
        if source in params.tune and (run.sampler, run.steps) not in tuned:
            yield f"{where}: {run.sampler} at {run.steps} steps is not in tune.{source}.solvers"
    if source != run.model:
        yield f"{where}.sigmas: {run.sigmas} belongs to another model than {run.model}"
    if run.images not in params.reference.floor.counts:
        yield (
            f"{where}.images: {run.images} is not among reference.floor.counts "
            f"{list(params.reference.floor.counts)}: do not set reference.floor.counts in pipestill config: it follows "
            "from the runs"
        )
    if run.mix not in params.reference.floor.plans:
        yield (
            f"{where}.plan={run.plan} needs a floor of plan {run.mix}, which is not among reference.floor.plans "
            f"{list(params.reference.floor.plans)}: do not set reference.floor.plans in pipestill config: it follows "
            "from the runs"
        )


def _unknown(where: str, name: str, known: Mapping[str, object] | Sequence[str], what: str) -> Iterator[str]:
    if name not in known:
        yield f"{where}: '{name}' is no {what}{nearest(name, known)}"
