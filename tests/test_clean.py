"""`pipestill clean` lists, deletes or archives what no entry refers to, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from pipestill import leftovers, pipeline
from pipestill.commands import clean, doctor
from workflow_project import TINY, Project

WITHOUT_STUDENT = (*TINY, "~distillation.students.student-4", "~sampling.runs.student-4")
GONE = {
    "artifacts/models/student-4",
    "artifacts/samples/student-4",
    "artifacts/evaluations/student-4",
    "metrics/student-4.json",
    "runs/distill/0123456789abcdef",
    "runs/logs/distill/student-4",
    "runs/logs/distill/student-4.log",
    "runs/previews/student-4-01234567",
    "runs/benchmarks/sample/student-4.tsv",
}


def leave(project: Project, stage: str, key: str, output: str, state: str) -> Path:
    """Work of an earlier run, as a stage leaves it."""
    folder = project.root / "runs" / stage / key
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "state-5.pt").write_bytes(b"x" * 1500)
    body = {"state": state, "output": str(project.root / output), "time": time.time(), "host": "elsewhere", "pid": 1}
    (folder / "status.json").write_text(json.dumps(body))
    return folder


@pytest.fixture
def project(tiny: Project, tmp_path: Path) -> Project:
    """The tiny project after its student was taken out of the parameters."""
    project = tiny.copy(tmp_path / "project")
    shutil.rmtree(project.root / "runs")
    project.here("config", *WITHOUT_STUDENT)
    leave(project, "distill", "0123456789abcdef", "artifacts/models/student-4", "stopped")
    leave(project, "train", "aaaa456789abcdef", "artifacts/models/teacher", "stopped")
    leave(project, "train", "bbbb456789abcdef", ".dvc/tmp/exps/one/artifacts/models/other", "stopped")
    for name in ("distill/student-4/20260101T000000-1.log", "distill/student-4.log", "train/teacher.log"):
        (project.root / "runs/logs" / name).parent.mkdir(parents=True, exist_ok=True)
        (project.root / "runs/logs" / name).write_text("words\n")
    for name in ("student-4-01234567", "teacher-aaaa4567"):
        (project.root / "runs/previews" / name).mkdir(parents=True)
        (project.root / "runs/previews" / name / "step-00000010.png").write_bytes(b"picture")
    (project.root / "runs/benchmarks/sample").mkdir(parents=True)
    (project.root / "runs/benchmarks/sample/student-4.tsv").write_text("s\n1\n")
    return project


def files(root: Path) -> dict[str, bytes]:
    """All files of a project but git's and DVC's own."""
    parts = ("data", "artifacts", "metrics", "runs")
    found = [file for part in parts for file in (root / part).rglob("*") if file.is_file()]
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in found}


def gone(name: str) -> bool:
    return any(name == item or name.startswith(f"{item}/") for item in GONE)


def test_without_a_terminal_it_only_lists(project: Project) -> None:
    (project.root / "artifacts/models/mine").mkdir()  # not made by pipestill
    (project.root / "data/mine").mkdir()
    (project.root / "metrics/mine.json").write_text('{"accuracy": 0.9}\n')
    (project.root / "metrics/empty.json").touch()
    before = files(project.root)
    said = project.here("clean")
    assert {line.strip().split("  ")[-2] for line in said.splitlines()[:-1]} == GONE
    assert f"{len(GONE)} items, " in said.splitlines()[-1]
    assert said.splitlines()[-1].endswith(
        "nothing was changed; add --yes to delete them, or --archive DIR --yes to move them"
    )
    assert "unfinished work of artifacts/models/student-4" in said
    assert files(project.root) == before


def test_an_archive_loses_nothing_and_replaces_nothing(project: Project, tmp_path: Path) -> None:
    before = files(project.root)
    project.here("clean", "--archive", str(tmp_path / "kept"), "--yes")
    assert files(project.root) == {name: content for name, content in before.items() if not gone(name)}
    assert files(tmp_path / "kept") == {name: content for name, content in before.items() if gone(name)}
    assert "nothing to clean" in project.here("clean")
    assert "recorded" in project.here("record"), "DVC may sign the rest"
    shutil.copytree(tmp_path / "kept", project.root, dirs_exist_ok=True)
    said = project.here("clean", "--archive", str(tmp_path / "kept"), "--yes", code=2)
    assert "exists already, and an archive replaces nothing" in said
    assert "which is being cleaned" in project.here("clean", "--archive", "artifacts/models/old", "--yes", code=2)
    assert files(project.root) == before


def test_record_and_doctor_advise_to_clean_and_never_to_remove_by_hand(project: Project) -> None:
    project.by_hand_here("report")  # as Snakemake does, before it lets DVC record
    left = [f"artifacts/{kind}/student-4" for kind in ("models", "samples", "evaluations")]
    recorded = project.here("record")
    assert (
        f"not recorded: report: {', '.join(left)} belong to no stage of dvc.yaml any more: "
        "pipestill clean deletes or archives what pipestill made there\n"
    ) in recorded
    checked = [*doctor.metrics(project.root), *doctor.stages(project.root, quick=True)]
    assert [line.text for line in checked if line.state != "ok"] == [
        "tables leave out runs that params.yaml does not name: metrics/student-4.json: pipestill clean",
        *(
            f"{name} belongs to no stage any more, and DVC counts it among inputs: pipestill clean"
            for name in sorted(left)
        ),
        "not recorded by DVC: report: pipestill record",
    ]
    assert not re.search(r"\brm\b", recorded)


def test_only_what_is_named_is_deleted(project: Project) -> None:
    before = files(project.root)
    project.here("clean", "--yes", "artifacts/models/student-4", "runs")
    kept = {name for name in before if not gone(name) or name.startswith(("artifacts/s", "artifacts/e", "metrics/"))}
    assert files(project.root).keys() == kept
    assert "nothing to clean at or below artifacts/models/teacher" in project.here(
        "clean", "--yes", "artifacts/models/teacher", code=2
    )


@pytest.mark.parametrize(("answer", "deleted"), [("y", True), ("", False), ("no", False)])
def test_it_asks_on_a_terminal(project: Project, monkeypatch: pytest.MonkeyPatch, answer: str, deleted: bool) -> None:
    terminal = SimpleNamespace(isatty=lambda: True)
    asked: list[str] = []
    monkeypatch.setattr(clean, "sys", SimpleNamespace(stdin=terminal, stdout=terminal))
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or answer)
    size = (project.root / "metrics/student-4.json").stat().st_size
    project.here("clean", "metrics")
    assert asked == [f"Delete 1 item, {clean.readable(size)}? [y/N] "]
    assert (project.root / "metrics/student-4.json").exists() != deleted


def test_what_is_being_written_is_left_alone(project: Project) -> None:
    leave(project, "distill", "cccc456789abcdef", "artifacts/models/student-4", "running")
    names = {item.name for item in leftovers.find(pipeline.load(project.root), project.root / "runs")}
    writing = {"artifacts/models/student-4", "runs/distill/0123456789abcdef", "runs/previews/student-4-01234567"}
    logs = {name for name in GONE if name.startswith("runs/logs/distill/")}
    assert len(logs) == 2
    assert names == GONE - writing - logs


def test_what_starts_while_it_asks_is_left_alone(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = SimpleNamespace(isatty=lambda: True)

    def answer(text: str) -> str:
        leave(project, "distill", "cccc456789abcdef", "artifacts/models/student-4", "running")
        return "y"

    monkeypatch.setattr(clean, "sys", SimpleNamespace(stdin=terminal, stdout=terminal))
    monkeypatch.setattr("builtins.input", answer)
    said = project.here("clean", "artifacts/models", "artifacts/samples")
    assert "artifacts/models/student-4 is in use now, and is left alone" in said
    assert "deleted 1 item, " in said
    assert (project.root / "artifacts/models/student-4/manifest.json").exists()
    assert not (project.root / "artifacts/samples/student-4").exists()


def test_ctrl_d_is_a_no(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = SimpleNamespace(isatty=lambda: True)

    def no_more(text: str) -> NoReturn:
        raise EOFError

    monkeypatch.setattr(clean, "sys", SimpleNamespace(stdin=terminal, stdout=terminal))
    monkeypatch.setattr("builtins.input", no_more)
    before = files(project.root)
    assert project.here("clean").endswith("\nnothing was changed\n")
    assert files(project.root) == before


def test_of_a_mark_with_several_lines_the_first_is_shown(project: Project) -> None:
    (project.root / "artifacts/models/student-4/.pipestill").write_text("model\ndigest  a file\n")
    (item,) = [
        item
        for item in leftovers.find(pipeline.load(project.root), project.root / "runs")
        if item.name == "artifacts/models/student-4"
    ]
    assert item.what == "model"


def test_sizes_are_readable() -> None:
    assert [clean.readable(size) for size in (0, 999, 1000, 123456, 5_500_000_000, 2 * 10**12)] == [
        *("0 B", "999 B", "1 kB", "123 kB", "5.5 GB", "2 TB")
    ]
