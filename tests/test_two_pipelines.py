"""Two pipelines in one git repository, each under its own .dvc or both under one: neither sees the other's stages."""

from __future__ import annotations

import shutil
from pathlib import Path

import dvc.lock
import pytest
import zc.lockfile

from pipestill import pipeline, tools
from workflow_project import TINY, Project

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(params=["a .dvc for each", "one .dvc"])
def two(request: pytest.FixtureRequest, tiny: Project, tmp_path: Path) -> tuple[Project, Project]:
    """The finished pipeline twice in one git repository."""
    repository = Project(tmp_path / "repository")
    first, second = Project(repository.root / "first"), Project(repository.root / "second")
    for project in (first, second):
        shutil.copytree(tiny.root, project.root, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    repository.git("init", "--quiet", "--initial-branch", "main")
    if request.param == "one .dvc":
        shutil.move(first.root / ".dvc", repository.root / ".dvc")
        shutil.rmtree(second.root / ".dvc")
    repository.commit("two pipelines")
    return first, second


def test_each_pipeline_is_recorded_run_and_accepted_by_itself(two: tuple[Project, Project], tiny: Project) -> None:
    first, second = two
    own = pipeline.load(tiny.root).stages
    assert pipeline.load(first.root).stages == pipeline.load(second.root).stages == own
    for project in two:
        assert f"all {len(own)} finished stages are recorded" in project.here("record")
    locks = [(project.root / "dvc.lock").read_bytes() for project in two]

    second.here("config", *TINY, "report.title=Second")
    second.by_hand_here("report")
    assert f"all {len(own)} finished" in first.here("record")
    assert (second.root / "dvc.lock").read_bytes() == locks[1], "recording the first signed a stage of the second"
    assert "recorded 1: report" in second.here("record")
    assert f"{len(own)} of {len(own)} stages" in second.here("sync")
    assert second.planned() == {}

    assert first.planned() == {}
    assert "Running stage" not in first.pipestill("repro")
    assert (first.root / "dvc.lock").read_bytes() == locks[0]
    said = first.here("doctor", "--quick")
    assert f"dvc.yaml resolves to {len(own)} stages" in said
    assert "DVC has recorded what stands" in said
    assert first.git("status", "--porcelain").split() == ["M", "second/dvc.lock", "M", "second/params.yaml"]


def test_a_mistake_in_the_other_pipeline_is_none_in_this_one(two: tuple[Project, Project]) -> None:
    first, second = two
    (second.root / "dvc.yaml").write_text("stages: [")
    assert "finished stages are recorded" in first.here("record")
    assert "dvc.yaml cannot be resolved: " in second.here("record", code=2)


def test_record_waits_while_the_other_pipeline_holds_dvcs_lock(
    tiny: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tiny.copy(tmp_path / "project")
    other = zc.lockfile.LockFile(str(project.root / ".dvc/tmp/lock"))
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if sum(waits) > 10 * dvc.lock.DEFAULT_TIMEOUT:
            other.close()

    monkeypatch.setattr(dvc.lock.time, "sleep", sleep)
    assert tools.unrecorded(project.root, ["dataset"]) == []
    assert sum(waits) > 10 * dvc.lock.DEFAULT_TIMEOUT
