"""Which artefacts a report is made from, and whether they belong together. Reads artefacts, writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipestill import artifacts
from pipestill.artifacts import Artifact, InputEntry
from pipestill.config import Params, Section
from pipestill.errors import InputError
from pipestill.versions import superseded

GROUPS = {"model": "models", "tuned": "tuned", "samples": "samples", "evaluation": "evaluations"}


@dataclass(frozen=True)
class Places:
    """Where to look: two artefacts, and folders that hold one artefact a name."""

    dataset: Path
    reference: Path
    models: Path
    samples: Path
    evaluations: Path
    tuned: Path | None = None


@dataclass(frozen=True)
class Sources:
    """Whole artefacts that agree with each other, by name; `left_out` says what a partial report does without."""

    dataset: Artifact
    reference: Artifact
    models: Mapping[str, Artifact]
    tuned: Mapping[str, Artifact]
    samples: Mapping[str, Artifact]
    evaluations: Mapping[str, Artifact]
    left_out: Mapping[str, str] = field(default_factory=dict)  # name to reason

    def named(self) -> dict[str, Artifact]:
        """Every artefact under the name that manifests and pages use, upstream first."""
        groups = zip(GROUPS.values(), (self.models, self.tuned, self.samples, self.evaluations), strict=True)
        named = {"dataset": self.dataset, "reference": self.reference}
        return named | {f"{group}/{name}": artifact for group, members in groups for name, artifact in members.items()}

    @property
    def inputs(self) -> dict[str, InputEntry]:
        return {name: artifact.as_input for name, artifact in self.named().items()}


def find(params: Params, places: Places, *, partial: bool = False) -> Sources:
    """The artefacts of every model and run that the parameters name, and the tuned ranges that runs use.

    Whatever else lies in the folders belongs to other parameters and is left alone. Raises InputError where one is
    missing, was made with other parameters or from others than those given; `partial` leaves such ones out instead
    and says so.
    """
    runs = params.sampling.runs
    sections: dict[str, Mapping[str, Section]] = {
        "model": {**params.converted, **params.teachers, **params.distillation.students},
        "tuned": params.tune,
        "samples": runs,
        "evaluation": dict.fromkeys(runs, params.evaluation),
    }
    dataset = artifacts.read(places.dataset, "dataset")
    _require(_otherwise(dataset, params.data))
    known = {"dataset": {dataset.manifest.payload: places.dataset}}
    left_out: dict[str, str] = {}

    def gather(kind: str, folder: Path, names: Iterable[str]) -> dict[str, Artifact]:
        found = {}
        for name in sorted(names):
            try:
                found[name] = artifacts.read(folder / name, kind)
            except InputError as error:
                if not partial:
                    raise InputError(f"{error} (--partial reports without it)") from error
                left_out[f"{GROUPS[kind]}/{name}"] = str(error)
        while True:  # what was made from one that is left out is left out too
            known[kind] = {artifact.manifest.payload: artifact.path for artifact in found.values()}
            problems = {
                name: _otherwise(artifact, sections[kind][name]) or _stranger(artifact, known)
                for name, artifact in found.items()
            }
            foreign = {name: problem for name, problem in problems.items() if problem is not None}
            if not foreign:
                return found
            if not partial:
                raise InputError(next(iter(foreign.values())))
            for name, problem in foreign.items():
                left_out[f"{GROUPS[kind]}/{name}"] = problem
                del found[name]

    reference = artifacts.read(places.reference, "reference")
    _require(_otherwise(reference, params.reference) or _stranger(reference, known))
    known["reference"] = {reference.manifest.payload: places.reference}
    models = gather("model", places.models, params.models)
    used = {run.sigmas.removeprefix("tuned/") for run in runs.values() if run.sigmas.startswith("tuned/")}
    tuned = gather("tuned", places.tuned, used) if places.tuned is not None else {}
    samples = gather("samples", places.samples, runs)
    evaluations = gather("evaluation", places.evaluations, samples)
    return Sources(
        dataset=dataset,
        reference=reference,
        models=models,
        tuned=tuned,
        samples={name: artifact for name, artifact in samples.items() if name in evaluations},
        evaluations=evaluations,
        left_out=left_out,
    )


def _require(problem: str | None) -> None:
    if problem is not None:
        raise InputError(problem)


def _otherwise(artifact: Artifact, section: Section) -> str | None:
    """Says that an artefact was made by an older stage, or with other parameters than its section states.

    Names are shared by experiments.
    """
    manifest = artifact.manifest
    why = superseded(manifest)
    if why is None and dict(manifest.parameters) != section.plain():
        why = "was made with different parameters than the current ones"
    return None if why is None else f"{artifact.path} {why}: run pipestill {manifest.stage} again"


def _stranger(artifact: Artifact, known: Mapping[str, Mapping[str, Path]]) -> str | None:
    """Says which input of an artefact is not among those known of its kind; kinds that nobody gave are not judged."""
    for name, entry in artifact.manifest.inputs.items():
        if entry.kind in known and entry.payload not in known[entry.kind]:
            places = ", ".join(map(str, known[entry.kind].values())) or "none that is complete"
            return (
                f"{artifact.path} was made from a different {entry.kind} ({name}) than the current one ({places}): "
                f"run pipestill {artifact.manifest.stage} again"
            )
    return None
