"""Ranks over the nodes of a real Slurm cluster: one world, its failures and its ends, as users see them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import payload, run, steps_logged, write_params
from pipestill import cli
from slurm_cluster import Cluster, missing

UPDATES = 30
pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    yield made
    made.stop()


def training(folder: Path, digits: Path, *more: object) -> list[object]:
    params = write_params(
        folder / "params.yaml",
        **{
            "teachers.teacher.network": {"channels": [8, 8], "layers": 1, "attention": [False, False]},
            "teachers.teacher.training": {"iterations": UPDATES, "batch": 16, "validate_every": 0},
            "operation": {"save_every": 0.001, "log_every": 1, "ranks": {"train": 4}, "nodes": {"train": 2}},
        },
    )
    return ["train", "--name", "teacher", "--dataset", digits, "--output", folder / "m", "--params", params, *more]


class Job:
    """`pipestill` in a batch job of two nodes; `code` and `said` once it has ended."""

    def __init__(self, cluster: Cluster, folder: Path, name: str, command: list[object]) -> None:
        self.cluster, self.folder, self.name = cluster, folder, name
        words = " ".join(f"'{word}'" for word in (sys.executable, "-m", "pipestill", *command))
        script = folder / f"{name}.sh"
        script.write_text(
            f"#!/bin/bash\nexport PIPESTILL_RUNS='{folder / 'runs'}' OMP_NUM_THREADS=1\n{words}\n"
            f"echo $? > '{folder / name}.part'\nmv '{folder / name}.part' '{folder / name}.code'\n"
        )
        log = folder / f"{name}.log"
        batch = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", f"--output={log}"]
        self.number = cluster.call(*batch, script).strip()

    @property
    def said(self) -> str:
        return (self.folder / f"{self.name}.log").read_text(errors="replace")

    def wait(self) -> int:
        code = self.folder / f"{self.name}.code"
        self.cluster.wait_for(code.exists, 120)
        return int(code.read_text())

    def wait_for_updates(self, count: int) -> None:
        self.cluster.wait_for(lambda: steps_logged(self.folder / "runs") >= count, 120)

    def rank(self, number: int) -> int:
        """The process id of a rank."""
        for entry in Path("/proc").iterdir():
            try:
                variables = (entry / "environ").read_text().split("\0")
            except OSError:
                continue
            mine = f"SLURM_JOB_ID={self.number}" in variables and f"RANK={number}" in variables
            if mine and any(word.startswith("LOCAL_RANK=") for word in variables):
                return int(entry.name)
        raise AssertionError(f"no rank {number}:\n{self.said}")


def test_two_nodes_of_two_ranks_make_what_four_ranks_make(cluster: Cluster, tmp_path: Path, digits: Path) -> None:
    job = Job(cluster, tmp_path, "job", training(tmp_path, digits))
    assert job.wait() == 0, job.said
    assert "4 ranks" in job.said
    alone = tmp_path / "alone"
    alone.mkdir()
    code, output = run(*training(alone, digits, "--nodes", 1), runs=alone / "runs")
    assert code == 0, output
    assert payload(tmp_path / "m") == payload(alone / "m")


def test_a_killed_rank_and_a_request_to_stop_end_every_node_and_the_next_job_goes_on(
    cluster: Cluster, tmp_path: Path, digits: Path
) -> None:
    job = Job(cluster, tmp_path, "killed", training(tmp_path, digits))
    job.wait_for_updates(5)
    os.kill(job.rank(3), signal.SIGKILL)  # on the node where the leader is not
    assert job.wait() == 3, job.said
    assert "pipestill train: rank 3 was ended by SIGKILL; its state is kept, start it again" in job.said

    job = Job(cluster, tmp_path, "stopped", training(tmp_path, digits))
    job.wait_for_updates(10)
    cluster.call("scancel", "--signal=TERM", job.number)  # reaches the steps, as a preemption does
    assert job.wait() == 75, job.said
    assert "stopped by SIGTERM after update" in job.said
    assert "state saved" in job.said

    job = Job(cluster, tmp_path, "limited", training(tmp_path, digits, "--deadline-min", 0))
    assert job.wait() == 75, job.said
    assert "stopped by its time limit after update" in job.said

    job = Job(cluster, tmp_path, "last", training(tmp_path, digits))
    assert job.wait() == 0, job.said
    assert "going on after update" in job.said
    assert not list((tmp_path / "runs" / "nodes").iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ranks", 4, "--nodes", 2], "2 nodes need a Slurm job"),
        (["--ranks", 3, "--nodes", 2], "3 ranks cannot be shared evenly by 2 nodes"),
    ],
)
def test_what_cannot_be_started_is_one_line(
    tmp_path: Path,
    digits: Path,
    more: list[object],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert cli.main([str(word) for word in training(tmp_path, digits, *more)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
