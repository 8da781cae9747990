"""What is the same bytes, and what only nearly: other settings of `operation`, another folder, another processor."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

from workflow_project import BY_HAND, ROOT, TINY, Project, dvc_stages, make_project

sys.path.insert(0, str(ROOT / "scripts"))
import reproduced

OTHERWISE = (
    *("operation.workers=1", "operation.cache=none", "operation.log_every=1", "operation.save_every=0.001"),
    *("operation.preview.share=1", "operation.preview.every=1", "operation.preview.each=1", "operation.preview.rows=2"),
)
OLDER = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
DIGITS = 3  # so few updates leave last bits small; the demo's many make them larger

pytestmark = pytest.mark.timeout(900)


def contents(root: Path) -> dict[str, str]:
    """The digest of every file that git or DVC tracks after a run, params.yaml aside."""
    tracked = [root / name for name in ("data", "artifacts", "metrics")]
    files = [file for folder in tracked for file in folder.rglob("*") if file.is_file()] + [root / "dvc.lock"]
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_operation_and_place_change_no_byte_that_is_tracked(tiny: Project, tmp_path: Path) -> None:
    project = make_project(tmp_path / "elsewhere" / "project", *TINY, *OTHERWISE)
    project.by_hand_here()
    assert "not recorded" not in project.here("record")
    found, expected = contents(project.root), contents(tiny.root)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []

    page = (project.root / "runs/report/index.html").read_text()
    assert page.count("Preview of student-4 after update") > 1
    assert "Preview of teacher after update 12" in page
    assert "Preview of" not in (project.root / "artifacts/report/index.html").read_text()


def test_no_tracked_text_tells_how_long_something_took(tiny: Project) -> None:
    for file in [*tiny.root.glob("metrics/*"), *tiny.root.glob("artifacts/**/*"), tiny.root / "dvc.lock"]:
        if file.suffix in (".json", ".csv", ".html", ".lock"):
            assert "seconds" not in file.read_text(encoding="utf-8"), file


def test_metrics_files_that_only_one_side_has_are_named(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", *TINY)
    (project.root / "metrics").mkdir()
    for name in ("floor", "one", "two"):
        (project.root / f"metrics/{name}.json").write_text("{}")
    project.commit()
    assert reproduced.other_metrics(project.root, "HEAD") == []
    (project.root / "metrics/two.json").rename(project.root / "metrics/three.json")
    assert reproduced.other_metrics(project.root, "HEAD") == ["metrics/three.json", "metrics/two.json"]


def test_another_processor_changes_last_digits_where_the_page_says_so(tiny: Project, tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", *TINY)
    for name in ("dvc.lock", "metrics"):
        source = tiny.root / name
        if source.is_dir():
            for file in source.iterdir():
                (project.root / name).mkdir(exist_ok=True)
                (project.root / name / file.name).write_bytes(file.read_bytes())
        else:
            (project.root / name).write_bytes(source.read_bytes())
    project.commit("as the other machine made it")
    commands = [shlex.split(str(stage["command"]))[1:] for stage in dvc_stages(project.root).values()]
    project.run(sys.executable, "-c", BY_HAND, json.dumps(commands), fresh=True, **OLDER)
    assert "not recorded" not in project.here("record")

    committed, here = reproduced.committed_lock(project.root, "HEAD"), reproduced.lock(project.root)
    assert reproduced.other_work(committed, here) == []
    differ = reproduced.different_stages(committed, here)
    assert not {stage.partition("@")[0] for stage in differ} & set(reproduced.SAME_EVERYWHERE)
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert "train@teacher" in differ, "else this has compared nothing"
    worst, where = reproduced.worst_metric(project.root, "HEAD")
    assert reproduced.digits(worst) >= DIGITS, f"{where}: {worst}"
    said = project.run(sys.executable, str(ROOT / "scripts/reproduced.py"), "--root", str(project.root))
    assert f"not {', '.join(differ)}\n" in said


def test_agreement_is_counted_in_significant_digits() -> None:
    assert [reproduced.digits(difference) for difference in (0.0, 4e-6, 0.004, 0.006, 0.04, 0.06, 0.9)] == [
        *(16, 6, 3, 2, 2, 1, 0),
    ]
