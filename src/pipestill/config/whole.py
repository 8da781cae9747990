"""All parameters together, and what must hold between their sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Self

from pydantic import model_validator

from pipestill.config.data import DataParams, ExampleParams, FetchParams
from pipestill.config.fields import Name, Section
from pipestill.config.measuring import EvaluationParams, ReferenceParams, ReportParams
from pipestill.config.models import ConvertParams, TeacherParams, TuneParams
from pipestill.config.runs import OperationParams, SamplingParams
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

    @model_validator(mode="after")
    def _names_refer(self) -> Self:
        students = self.distillation.students
        kinds: dict[str, Mapping[str, Section]] = {
            "converted model": self.converted,
            "teacher": self.teachers,
            "student": students,
        }
        for (first, own), (second, other) in combinations(kinds.items(), 2):
            if clash := set(own) & set(other):
                raise ValueError(f"'{min(clash)}' names both a {first} and a {second}")
        models = [*self.converted, *self.teachers, *students]
        self._files_are_fetched()
        for name, teacher in self.teachers.items():
            where = f"teachers.{name}"
            if teacher.begins_with is not None:
                _known(f"{where}.start", teacher.begins_with, models, "model")
                self._ends_somewhere(name)
            elif teacher.network is not None and (misfit := teacher.network.misfit(self.data.resolution)):
                raise ValueError(f"{where}: {misfit}")
        if not self.data.labels:
            self._nothing_asks_for_classes()
        for name in self.tune:
            _known(f"tune.{name}", name, [*self.converted, *self.teachers], "teacher")
            if not any(run.sigmas == f"tuned/{name}" for run in self.sampling.runs.values()):
                raise ValueError(f"tune.{name}: no run has sigmas=tuned/{name}, so nothing would use it")
        for name, student in students.items():
            where = f"distillation.students.{name}"
            _known(f"{where}.teacher", student.teacher, [*self.converted, *self.teachers], "teacher")
            _known(f"{where}.init", student.init, models, "model")
        for name, run in self.sampling.runs.items():
            where = f"sampling.runs.{name}"
            _known(f"{where}.model", run.model, models, "model")
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

    def _ends_somewhere(self, name: str) -> None:
        """Teachers that start from one another in a circle could none of them begin."""
        seen, here = [name], self.teachers[name].begins_with
        while here in self.teachers:
            if here in seen:
                raise ValueError(f"teachers.{name}.start goes round in a circle: {' -> '.join((*seen, here))}")
            seen.append(here)
            here = self.teachers[here].begins_with

    def _files_are_fetched(self) -> None:
        """What is taken from fetched files names entries and files that there are."""
        for name, made in self.converted.items():
            where = f"converted.{name}"
            _known(f"{where}.input", made.input, self.fetched, "entry of fetched")
            _known(f"{where}.file", made.file, [file.path for file in self.fetched[made.input].files], "fetched file")
        kind, _, source = self.reference.files.partition("/")
        if kind == "fetched":
            _known("reference.files", source, self.fetched, "entry of fetched")

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
