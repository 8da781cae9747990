"""Two people with a clone each and one DVC cache between them, as on a cluster: what one made the other has."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from workflow_project import TINY, Project

pytestmark = pytest.mark.timeout(600)


def test_what_one_recorded_the_other_checks_out_and_never_runs(tiny: Project, tmp_path: Path) -> None:
    first, second, cache = tiny.copy(tmp_path / "first"), Project(tmp_path / "second"), tmp_path / "cache"
    first.dvc("config", "cache.dir", str(cache))
    first.dvc("config", "cache.shared", "group")
    assert "recorded 11: " in first.here("record"), "the new cache has nothing yet"
    first.commit("one cache for all")

    first.git("clone", "--quiet", str(first.root), str(second.root))
    second.dvc("checkout", "--quiet")
    assert second.payloads() == first.payloads() != {}
    assert "11 of 11 stages" in second.here("sync")
    assert "all 11 finished stages are recorded" in second.here("record")
    assert second.planned() == {}
    assert not (second.root / ".dvc/cache").exists()
    for folder in (path for path in cache.rglob("*") if path.is_dir()):
        assert folder.stat().st_mode & stat.S_IWGRP, f"{folder} is closed to the other"

    second.here("config", *TINY, "report.title=Second")
    second.by_hand_here("report")
    assert "recorded 1: report" in second.here("record")
    second.commit("another title")
    first.here("config", *TINY, "report.title=Second")
    said = first.dvc("repro")
    assert "Stage 'report' is cached" in said
    assert "Running stage" not in said
    assert first.payloads() == second.payloads()
    assert "11 of 11 stages" in first.here("sync")
