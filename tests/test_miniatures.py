"""Each experiment of conf/experiment/ in miniature, every stage as dvc.yaml states it, through to its report."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
from collections.abc import Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from miniatures import EXPERIMENTS, composed, few_images, kinds_of_runs, small, small_inception, write_inputs
from pipestill import configure, digests, pipeline
from pipestill.config import Params
from pipestill.pipeline import Stage
from workflow_project import ROOT, Project, lay_out

SHARED = ("example", "fetch", "dataset", "reference")  # stages whose artefacts several experiments have in common


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artefacts by what they were made from: the same work is not done once for each experiment."""
    return tmp_path_factory.mktemp("kept")


def laid_out(root: Path, params: Params) -> Project:
    """A checkout whose params.yaml states these parameters, with what a user brings."""
    lay_out(root)
    shutil.copytree(ROOT / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    project = Project(root)
    project.git("init", "--quiet")
    (root / "params.yaml").write_text(configure.render(params))
    write_inputs(root, params)
    return project


def in_order(stages: pipeline.Pipeline) -> list[Stage]:
    by_address = {stage.address: stage for stage in stages.stages}
    before = {stage.address: [source.address for source in stages.upstream(stage)] for stage in stages.stages}
    return [by_address[address] for address in TopologicalSorter(before).static_order()]


def run_all(project: Project, kept: Path) -> None:
    """Every stage's command in this process; what an earlier experiment made of the same is put there first."""
    known: dict[str, str] = {}
    stages = pipeline.load(project.root)
    for stage in in_order(stages):
        sources = [known[source.address] for source in stages.upstream(stage)]
        known[stage.address] = digests.of_value([stage.command, stage.version, dict(stage.parameters), sources])
        output, copy = project.root / stage.output, kept / known[stage.address]
        if stage.name in SHARED and copy.exists():
            shutil.copytree(copy, output, copy_function=os.link)
        project.here(*shlex.split(stage.command)[1:])
        if stage.name in SHARED and not copy.exists():
            shutil.copytree(output, copy, copy_function=os.link)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_reaches_its_report(
    experiment: str, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipestill.evaluation.extractors.inception", small_inception)
    monkeypatch.setattr("pipestill.data.examples.example_images", few_images)
    params = small(experiment)
    project = laid_out(tmp_path / "project", params)
    run_all(project, kept)

    body = json.loads((project.root / "artifacts/report/report.json").read_text())
    assert {run["name"] for run in body["runs"]} == set(params.sampling.runs)
    assert {model["name"] for model in body["models"]} == set(params.models)
    assert body["left_out"] == []
    distances = [f"{kind}_{space}" for space in params.reference.protocol.extractors for kind in ("fd", "floor_fd")]
    for run in body["runs"]:
        metrics = json.loads((project.root / "artifacts/evaluations" / run["name"] / "metrics.json").read_text())
        assert all(math.isfinite(metrics[key]) and metrics[key] > 0 for key in distances), (run["name"], metrics)
        assert {key: run["metrics"][key] for key in distances} == {key: metrics[key] for key in distances}
        assert bool(run["intervals"]) == (len(params.sampling.runs[run["name"]].seeds) > 1)
    table = project.here("report", "--print-table", "metrics")
    assert all(f"\n{name} " in table for name in params.sampling.runs)
    states = {row["stage"]: row["state"] for row in json.loads(project.here("status", "--json"))}
    assert set(states.values()) == {"done"}, states
    for name in params.sampling.runs:
        assert "not here" not in project.here("trace", f"artifacts/evaluations/{name}")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_miniature_differs_from_its_experiment_in_sizes_only(experiment: str) -> None:
    whole, miniature = composed(experiment), small(experiment)
    assert set(miniature.sampling.runs) <= set(whole.sampling.runs)
    assert (set(miniature.teachers), set(miniature.converted)) == (set(whole.teachers), set(whole.converted))

    def kinds(params: Params) -> Mapping[str, set[object]]:
        runs, students = params.sampling.runs.values(), params.distillation.students.values()
        return {
            "samplers": {(run.sampler, run.sigmas.partition("/")[0], run.spacing, run.clip) for run in runs},
            "sampling": {(run.store, run.guidance != 1, run.precision, run.plan, run.weights) for run in runs},
            "students": {(student.transition, student.rollout, student.precision) for student in students},
            "losses": {(student.gan.generator_weight, student.dm, student.label_dropout) for student in students},
            "stages": {name for name in ("examples", "fetched", "tune") if getattr(params, name)},
            "reference": {params.reference.protocol.extractors, params.reference.statistics, params.reference.files},
        }

    assert kinds(miniature) == kinds(whole)
    assert kinds_of_runs(miniature) == kinds_of_runs(whole)
