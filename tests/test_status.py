"""`pipestill status`: what it says of stages that run, stop, are killed or fail, from what they leave behind."""

from __future__ import annotations

import json
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from commands import Command, steps_logged, write_params
from pipestill import cli, pipeline, status
from pipestill.commands import status as command
from pipestill.errors import InputError
from pipestill.previews import folder
from pipestill.stopping import handlers_kept
from workflow_project import Project, make_project

UPDATES = 5000


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A fresh checkout in which nothing has run."""
    return make_project(tmp_path_factory.mktemp("status") / "project", "experiment=miniature")


def row(project: Project, runs: Path, stage: str) -> command.Row:
    (found,) = [row for row in command.look(pipeline.load(project.root), runs) if row.stage == stage]
    return found


def said(row: command.Row) -> str:
    return next(command.lines([row], Path.cwd()))


def begun(project: Project, digits: Path, folder: Path) -> Command:
    """A training of the project's teacher that has begun, its work and logs below `folder`."""
    params = write_params(
        folder / "params.yaml",
        **{
            "teachers.teacher.network": {"channels": [8, 8], "layers": 1, "attention": [False, False]},
            "teachers.teacher.training": {"iterations": UPDATES, "batch": 16, "validate_every": 0},
            "operation": {"log_every": 1, "save_every": 0.5},
        },
    )
    words = ["train", "--name", "teacher", "--dataset", digits, "--params", params]
    variables = {status.JOB: "1234", status.ATTEMPT: "2"}
    output = project.root / "artifacts/models/teacher"
    started = Command(*words, "--output", output, runs=folder / "runs", environment=variables)
    target = steps_logged(folder / "runs") + 3
    assert started.wait_until(lambda: steps_logged(folder / "runs") >= target)
    return started


def test_a_training_that_runs_stops_and_is_killed(project: Project, digits: Path, tmp_path: Path) -> None:
    training = begun(project, digits, tmp_path)
    runs = tmp_path / "runs"
    assert training.wait_until(lambda: row(project, runs, "train@teacher").doing is not None)
    found = row(project, runs, "train@teacher")
    assert (found.state, found.job, found.ranks, found.attempt) == ("running", "1234", 1, 2)
    assert found.doing is not None
    assert 1 <= found.doing["done"] <= steps_logged(runs)
    assert found.doing["total"] == UPDATES
    line = said(found)
    assert f" of {UPDATES:,} updates (" in line
    assert " left, loss=" in line
    assert f"job 1234 on {socket.gethostname()}, attempt 2" in line
    assert row(project, runs, "distill@student-4").why == "for dataset, reference, train@teacher"

    training.process.send_signal(signal.SIGTERM)
    assert training.wait() == 75
    found = row(project, runs, "train@teacher")
    assert found.state == "stopped"
    assert "stopped by SIGTERM after update" in str(found.why)

    training = begun(project, digits, tmp_path)
    training.kill_all()
    found = row(project, runs, "train@teacher")
    assert found.state == "lost"
    assert "its state is kept, start it again" in said(found)


def write_word(runs: Path, output: Path, **changes: Any) -> None:
    folder = runs / "train" / "abc"
    folder.mkdir(parents=True, exist_ok=True)
    body = {"state": "running", "host": "elsewhere", "pid": 1, "time": time.time(), "output": str(output)} | changes
    (folder / status.FILE).write_text(json.dumps(body))


def test_a_stage_on_another_machine_is_lost_when_it_has_been_silent(project: Project, tmp_path: Path) -> None:
    output = project.root / "artifacts/models/teacher"
    write_word(tmp_path, output)
    assert row(project, tmp_path, "train@teacher").state == "running"
    write_word(tmp_path, output, time=time.time() - status.SILENT - 1)
    assert row(project, tmp_path, "train@teacher").state == "lost"


def test_the_newest_preview_of_a_training_is_shown(project: Project, tmp_path: Path) -> None:
    place = folder("teacher", "0123456789abcdef", tmp_path)
    for step in (20, 140, 100):
        (place / f"step-{step:08d}").mkdir(parents=True)
        (place / f"step-{step:08d}.png").touch()
    assert row(project, tmp_path, "train@teacher").preview is None
    write_word(tmp_path, project.root / "artifacts/models/teacher", key="0123456789abcdef")
    found = row(project, tmp_path, "train@teacher")
    assert found.preview == str(tmp_path / "previews/teacher-01234567/step-00000140.png")
    assert list(command.lines([found], Path.cwd()))[1].split() == ["preview", found.preview]
    below = replace(found, preview="runs/previews/x.png", log="runs/logs/x.log", state="failed")
    shown = [line.split()[-1] for line in command.lines([below], Path.cwd() / "docs")]
    assert shown[1:3] == ["../runs/logs/x.log", "../runs/previews/x.png"], "as seen from where the user stands"


def test_an_attempt_that_failed_before_it_could_say_a_word(project: Project, tmp_path: Path) -> None:
    place = tmp_path / "logs" / "train" / "teacher"
    place.mkdir(parents=True)
    (place / "20260101T000000-1.log").write_text("older\n")
    (place / "20260101T000100-2.log").write_text("a line\npipestill train: no such file\n\n")
    (place / "20260101T000100-2-rank-1.log").write_text("a rank's\n")
    (place / "outcome").write_text("3\n")
    (place / "futile").write_text("2\n")
    found = row(project, tmp_path, "train@teacher")
    assert (found.state, found.why) == (
        "failed",
        "pipestill train: no such file, given up: two attempts saved nothing",
    )
    assert str(found.log) in list(command.lines([found], Path.cwd()))[1]
    write_word(tmp_path, project.root / "artifacts/models/teacher", time=time.time() + 1)
    assert row(project, tmp_path, "train@teacher").state == "running", "what was heard later counts"
    (tmp_path / "train" / "abc" / status.FILE).unlink()
    (place / "outcome").write_text("0\n")
    assert row(project, tmp_path, "train@teacher").state == "waiting"


@pytest.mark.parametrize(
    ("words", "number", "code"),
    [
        (("--watch", "30"), signal.SIGINT, 0),
        (("--watch", "30"), signal.SIGTERM, 75),
        ((), signal.SIGINT, 75),
    ],
)
def test_ctrl_c_is_how_a_watch_ends_and_a_stop_elsewhere(
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    number: signal.Signals,
    code: int,
) -> None:
    monkeypatch.chdir(project.root)
    looked = command.look

    def look(*arguments: Any) -> list[command.Row]:
        signal.raise_signal(number)
        return looked(*arguments)

    monkeypatch.setattr(command, "look", look)
    with handlers_kept():
        assert cli.main(["status", *words]) == code
    said = capsys.readouterr().err
    assert said == ("" if code == 0 else f"pipestill status: stopped by {number.name}: start it again\n")


def test_figures_of_each_rule(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Snakemake writes them"):
        list(command.benchmark_lines(tmp_path))
    head = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n"
    place = tmp_path / "benchmarks" / "sample"
    place.mkdir(parents=True)
    (place / "one.tsv").write_text(f"{head}2.0\t0:00:02\t100.0\t0\t0\t0\t0\t0\t50.0\t1\n")
    (place / "two.tsv").write_text(f"{head}3.5\t0:00:03\t300.0\t0\t0\t0\t0\t0\t70.0\t1\n")
    (place / "three.tsv").write_text(f"{head}0.5\t0:00:00\tNA\tNA\tNA\tNA\tNA\tNA\tNA\tNA\n")
    assert list(command.benchmark_lines(tmp_path))[1].split() == ["sample", "3", "6.0", "3.5", "300", "60"]


def test_a_word_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    with status.told(tmp_path / "gone" / "status.json", {}):
        pass
    assert not list(tmp_path.iterdir())
