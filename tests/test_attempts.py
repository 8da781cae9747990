"""How a scheduler's attempts at a stage end: tried again, given up, stopped before the job's end, kept in logs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipestill import logs, slurm, status, stopping
from pipestill.config import OperationParams
from pipestill.distributed import World
from pipestill.errors import InputError, Stopped, SurroundingsError
from pipestill.training import loop, state
from pipestill.training.tracking import Silent
from pipestill.work import open_work
from test_training_parts import Growing
from workflow_project import ROOT

ATTEMPT = ROOT / "workflow" / "scripts" / "attempt.sh"


class Attempts:
    """Attempts at a stage whose command is a line of shell; `ran` counts those that did anything."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.number = folder, folder / "logs" / "train" / "teacher.log", 0
        self.log.parent.mkdir(parents=True)
        self.place = logs.folder(folder, "train", "teacher")
        self.states = folder / "work" / "state"
        self.states.mkdir(parents=True)

    def words(self, command: str) -> list[str]:
        self.number += 1
        noted = f"echo x >> {self.folder}/ran; printf %s {self.states} > $PIPESTILL_STATE"
        return ["bash", str(ATTEMPT), str(self.number), str(self.log), f"{noted}; {command}"]

    def make(self, command: str) -> tuple[int, str]:
        self.log.unlink(missing_ok=True)  # as Snakemake does before each attempt
        done = subprocess.run(self.words(command), capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    @property
    def ran(self) -> int:
        return len((self.folder / "ran").read_text().splitlines())


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    return Attempts(tmp_path)


@pytest.mark.parametrize("code", [1, 3, 75])
def test_after_two_attempts_that_saved_nothing_further_ones_end_at_once(attempts: Attempts, code: int) -> None:
    fails = f"echo words; exit {code}"
    assert attempts.make(fails) == (code, "words\n")
    assert attempts.make(fails) == (code, "words\n")
    given_up = f"not tried again: two attempts in a row saved nothing to go on from, the last ended with {code}: see"
    ended, said = attempts.make(fails)
    assert ended == code
    assert said.startswith(given_up)
    assert attempts.log.read_text() == "words\n", "the last log is there again"
    assert attempts.make(fails) == (code, ""), "it is said once"
    assert attempts.log.read_text().startswith(f"words\n{given_up}")
    assert attempts.ran == 2


def test_an_attempt_that_saved_something_makes_room_for_two_more(attempts: Attempts) -> None:
    states = attempts.states
    for step in range(5):
        assert attempts.make(f"rm -f {states}/*; echo s > {states}/state-{step}.pt; exit 75")[0] == 75
    assert attempts.ran == 5
    for _ in range(3):
        attempts.make("exit 75")
    assert attempts.ran == 7, "the fifth saved, the two that follow did not"


def test_what_a_kill_leaves_half_written_is_not_taken_for_saved(attempts: Attempts) -> None:
    for number in range(4):
        attempts.make(f"echo x > {attempts.states}/.state-9.pt.{number}.partial; exit 3")
    assert attempts.ran == 2


def test_a_killed_attempt_is_followed_by_another(attempts: Attempts) -> None:
    assert attempts.make(f"echo s > {attempts.states}/one; kill -9 $PPID; sleep 0.2")[0] != 0
    assert attempts.make("exit 0")[0] == 0
    assert attempts.ran == 2


def test_wrong_input_is_not_tried_again(attempts: Attempts) -> None:
    assert attempts.make("echo wrong; exit 2")[0] == 2
    code, said = attempts.make("exit 0")
    assert (code, attempts.ran) == (2, 1)
    assert said == "", "whoever started the run says it once, at the end"
    assert attempts.log.read_text() == "wrong\nnot tried again: the attempt before ended with 2, wrong input\n"


def test_what_is_wrong_with_an_input_goes_to_the_logs(attempts: Attempts) -> None:
    """The stage prints its progress; its message waits for the end of the run."""
    code, said = attempts.make(f"echo begun; exec {sys.executable} -m pipestill train --name teacher")
    assert (code, said) == (2, "begun\n")
    ended = logs.last(attempts.place)
    assert ended is not None
    assert ended.said.startswith("pipestill train: the following arguments are required: ")
    assert attempts.log.read_text() == f"begun\n{ended.said}\n"
    assert attempts.make("exit 0")[0] == 2
    attempts.number = 0
    assert attempts.make("exit 0") == (0, ""), "it is not said of the next series"
    assert attempts.log.read_text() == ""


def test_every_attempt_keeps_its_log_and_a_request_to_stop_loses_no_line(attempts: Attempts) -> None:
    attempts.make("echo first; exit 75")
    script = "trap 'echo saving; exit 75' TERM; echo ready; while :; do read -rt 0.1 < /dev/zero; done"
    process = subprocess.Popen(attempts.words(script), stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGTERM)  # as Slurm does: to every process of the job
    assert process.wait(60) == 75
    assert process.stdout.read() == "saving\n"
    assert [path.read_text() for path in logs.attempts(attempts.place)] == ["first\n", "ready\nsaving\n"]
    ended = logs.last(attempts.place)
    assert ended is not None
    assert (ended.code, ended.said) == (75, "saving")


def test_a_stage_stops_before_its_job_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(stopping.JOB_END, str(time.time() + 100))
    assert not stopping.StopRequest(margin=90).requested()
    early = stopping.StopRequest(margin=110)
    assert early.requested()
    assert early.reason == "the end of its job"
    monkeypatch.setenv(stopping.JOB_END, "soon")
    with pytest.raises(InputError, match="PIPESTILL_JOB_END=soon is no time"):
        stopping.StopRequest()


def test_the_margin_grows_with_the_time_that_saving_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving takes 30 s of a clock that stands still otherwise, and a step 7 s: 67 s are left from then on."""
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setenv(stopping.JOB_END, str(now[0] + 110))
    save = state.save

    def slowly(*arguments: Any, **named: Any) -> None:
        save(*arguments, **named)
        now[0] += 30.0

    class Steady(Growing):
        def update(self, step: int) -> dict[str, torch.Tensor]:
            now[0] += 7.0
            return {"loss": self.weight}

    monkeypatch.setattr(state, "save", slowly)
    world = World(0, 1, torch.device("cpu"), stop=stopping.StopRequest(5.0))
    operation = OperationParams(save_every=1.0, log_every=1, margin=5.0)
    arguments: dict[str, Any] = {"parameters": {}, "inputs": {}, "output": tmp_path / "out"}
    with (
        pytest.raises(Stopped, match="stopped by the end of its job after update 2 of 10"),
        open_work(kind="model", stage="train", version=1, **arguments) as work,
    ):
        loop.run(Steady(), work=work, world=world, operation=operation, label="steady", tracker=Silent())
    # 7 s for the first update and 30 to save it, 7 for the second: 66 of 110 are left, and it is saved at once
    assert now[0] == 1000 + 7 + 30 + 7 + 30


SAYS = (
    "JobId=9 ArrayJobId=7 JobState=COMPLETED NodeList=n3 NumNodes=8 EndTime=2020-01-01T00:00:00\n"
    "JobId=7 ArrayJobId=7 JobState={state} NodeList=n[1-2] NumNodes={nodes} EndTime={end}\n"
    "JobId=8 ArrayJobId=7 JobState=PENDING NodeList=n3 NumNodes=8 EndTime=Unknown\n"
)


def answers(folder: Path, patch: pytest.MonkeyPatch, script: str) -> None:
    """Lets `scontrol` answer as a script does."""
    scontrol = folder / "scontrol"
    scontrol.write_text(f"#!/bin/sh\n{script}\n")
    scontrol.chmod(0o755)
    patch.setenv("PATH", str(folder), prepend=os.pathsep)
    patch.setenv("SLURM_JOB_ID", "7")


@pytest.mark.parametrize(
    ("state", "nodes", "end", "found"),
    [
        ("RUNNING", "2", "2026-11-26T12:00:00", (2, True)),
        ("RUNNING", "1-1", "Unknown", (1, False)),
        ("COMPLETED", "2", "2026-11-26T12:00:00", (2, False)),
    ],
)
def test_a_jobs_nodes_and_end_are_what_slurm_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, nodes: str, end: str, found: tuple[int, bool]
) -> None:
    """Of an array's first task Slurm shows all; a job that has ended is an old shell's and ends nothing."""
    answers(tmp_path, monkeypatch, f"printf '%s' '{SAYS.format(state=state, nodes=nodes, end=end)}'")
    job = slurm.current_job()
    assert job is not None
    assert (job.number, job.nodes, job.end is not None) == ("7", *found)
    if job.end is not None:
        assert time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(job.end)) == end


def test_a_controller_that_is_away_for_a_moment_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says = SAYS.format(state="RUNNING", nodes="2", end="Unknown")
    answers(
        tmp_path, monkeypatch, f"[ -e {tmp_path}/asked ] || {{ touch {tmp_path}/asked; exit 1; }}; printf '%s' '{says}'"
    )
    job = slurm.current_job()
    assert job is not None
    assert job.nodes == 2


def test_a_controller_that_does_not_answer_is_no_wrong_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(tmp_path, monkeypatch, "exit 1")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(SurroundingsError, match="scontrol show job --oneliner 7 gives no answer"):
        slurm.current_job()
    monkeypatch.delenv(status.JOB, raising=False)
    slurm.note_job()
    assert "its time limit is not known" in capsys.readouterr().err


def test_what_an_earlier_series_left_does_not_count(attempts: Attempts) -> None:
    """The first attempt of the next series could not be submitted: the second is the first that runs."""
    assert attempts.make("exit 2")[0] == 2
    attempts.number = 3
    assert attempts.make("exit 0")[0] == 0


def test_a_full_disk_at_an_attempts_end_does_not_give_up(attempts: Attempts) -> None:
    attempts.make("exit 3")
    for name in ("outcome", "futile"):
        (attempts.place / name).write_text("")
    assert attempts.make("exit 0")[0] == 0
