"""The pipeline on a real Slurm cluster: what it makes there, and what it outlives, as users and operators see it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

import forked
from commands import SLOWLY, here, payload, run, steps_logged, write_params
from pipestill import cli
from slurm_cluster import Cluster, missing
from workflow_project import Project, make_project

UPDATES = 30
OVER_NODES = ("operation.ranks={train: 4, distill: 4}", "operation.nodes={train: 2, distill: 2}")
EVERY_UPDATE = ("operation.save_every=0.001", "operation.log_every=1")
EXPERIMENT = (
    "experiment=miniature",
    "~distillation.students.student-4",
    "~sampling.runs.student-4",
    "sampling.runs.teacher-euler-4={model: teacher, sampler: euler, steps: 4, sigmas: models/teacher}",
    "sampling.runs.teacher-heun-3={model: teacher, sampler: heun, steps: 2, sigmas: models/teacher}",
)
TEACHER = "artifacts/models/teacher"
QUICK = ("--slurm-no-account", "--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "1")
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    """Ends what a test that failed left running."""
    yield
    while Submitted.processes:
        process = Submitted.processes.pop()
        process.kill()
        process.wait()


class Submitted:
    """Snakemake with the profile for Slurm, running in a project; it does not outlive its test."""

    processes: ClassVar[list[subprocess.Popen[bytes] | forked.Process]] = []

    def __init__(self, cluster: Cluster, project: Project, *arguments: str, **environment: str) -> None:
        self.cluster, self.root = cluster, project.root
        self.log = project.root / "snakemake.log"
        script = Path(__file__).with_name("slurm_snakemake.py")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PIPESTILL_", "DVC_"))}
        programs = [str(folder) for folder in (forked.stand_in(), Path(sys.executable).parent) if folder]
        variables = inherited | {"PATH": os.pathsep.join([*programs, os.environ["PATH"]])} | environment
        words = ["--profile", "slurm", *QUICK, *arguments]
        with self.log.open("wb") as log:
            own = forked.start(str(script), words, variables, output=log, folder=project.root, kind="tools")
            if own is None and SLOWLY.items() <= variables.items():
                pytest.skip("only forked trainings can be slowed down")
            self.process: subprocess.Popen[bytes] | forked.Process = own or subprocess.Popen(
                [sys.executable, str(script), *words],
                cwd=project.root,
                env=variables,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        self.processes.append(self.process)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 600) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.said}\n{self.logs()}") from None

    def logs(self) -> str:
        """What the attempts at every stage printed."""
        found = sorted((self.root / "runs" / "logs").glob("*/*/*.log"))
        return "\n".join(f"== {path.relative_to(self.root)}\n{path.read_text(errors='replace')}" for path in found)

    def wait_for(self, condition: object, seconds: float = 120) -> None:
        """Waits for a condition, as long as Snakemake runs."""

        def holds() -> bool:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.said}\n{self.logs()}"
            return condition()  # type: ignore[operator, no-any-return]

        self.cluster.wait_for(holds, seconds, lambda: f"{self.said}\n{self.logs()}")

    def wait_for_updates(self, count: int = 3) -> None:
        """Waits until the training has gone on by so many updates."""
        target = steps_logged(self.root / "runs") + count
        self.wait_for(lambda: steps_logged(self.root / "runs") >= target)

    def wait_for_job(self, *, other_than: str = "", nodes: str = "n[1-2]") -> str:
        """The number of the only running job once it is another one on these nodes, and trains."""
        found: list[str] = []

        def runs() -> bool:
            found[:] = [job for job, listing in self.cluster.running() if job != other_than and listing == nodes]
            return len(found) == 1

        self.wait_for(runs)
        (number,) = found
        self.wait_for_updates()
        return number


@pytest.fixture(scope="module")
def finished(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The miniature, run whole on the cluster; the tests leave it as it is."""
    project = make_project(tmp_path_factory.mktemp("cluster") / "project", *EXPERIMENT, *OVER_NODES)
    submitted = Submitted(cluster, project)
    assert submitted.wait() == 0, f"{submitted.said}\n{submitted.logs()}"
    return project


def test_a_whole_experiment_over_nodes_and_as_arrays(finished: Project, tmp_path: Path) -> None:
    said = (finished.root / "snakemake.log").read_text()
    assert "Submitted array job" in said
    for stage, entry in (("train", "teacher"), ("distill", "student-10")):
        (record,) = [
            json.loads(path.read_text())
            for path in (finished.root / "runs" / stage).glob("*/record.json")
            if json.loads(path.read_text())["output"].endswith(f"/{entry}")
        ]
        assert record["ranks"] == 4
    assert finished.unfinished_for_dvc() == set()
    assert finished.planned() == {}
    assert {row["state"] for row in json.loads(finished.pipestill("status", "--json"))} == {"done"}
    finished.snakemake("--report", str(tmp_path / "report.zip"))
    with zipfile.ZipFile(tmp_path / "report.zip") as report:
        names = [Path(name).name for name in report.namelist()]
        page = report.read("report/report.html").decode()
    assert (names.count("grid.png"), names.count("index.html")) == (4, 1)
    for caption in ("Samples of student-10", "What the images are:", "The results table, curves, sample grids"):
        assert caption in page, caption
    figures = finished.pipestill("status", "--benchmarks")
    assert {line.split()[0] for line in figures.splitlines()[1:]} >= {"train", "distill", "sample", "report"}


def test_samples_are_those_that_the_same_models_give_here(finished: Project, tmp_path: Path) -> None:
    at = finished.root / "artifacts"
    runs = dict.fromkeys(("teacher-euler-4", "teacher-heun-3"), "models/teacher")
    runs |= {"teacher-2m-4": "tuned/teacher", "student-10": "models/student-10"}
    for name, sigmas in runs.items():
        model = at / "models" / name if name.startswith("student") else at / "models/teacher"
        words = ["sample", "--name", name, "--model", model, "--sigmas", at / sigmas, "--dataset", at / "dataset"]
        params = ["--params", finished.root / "params.yaml", "--output", tmp_path / name]
        here(*words, *params, runs=tmp_path / "runs")
        assert payload(tmp_path / name) == payload(at / "samples" / name), name


def test_a_deadline_a_third_of_what_the_training_needs(cluster: Cluster, finished: Project, tmp_path: Path) -> None:
    """A job of a minute whose margin is that minute leaves each attempt one update: three make a training of three."""
    project = finished.copy(tmp_path / "project")
    project.pipestill("config", *EXPERIMENT, "training.iterations=3", "operation.margin=60")
    submitted = Submitted(cluster, project, f"{TEACHER}/manifest.json", "--set-resources", "train:runtime=1")
    assert submitted.wait() == 0, f"{submitted.said}\n{submitted.logs()}"
    said = submitted.logs()
    for update in (1, 2):
        assert said.count(f"stopped by the end of its job after update {update} of 3, state saved") == 1, said
        assert said.count(f"going on after update {update} of 3") == 1, said
    words = ["train", "--name", "teacher", "--dataset", project.root / "artifacts/dataset"]
    here(*words, "--output", tmp_path / "m", "--params", project.root / "params.yaml", runs=tmp_path / "runs")
    assert payload(project.root / TEACHER) == payload(tmp_path / "m")


def test_a_training_outlives_what_happens_to_clusters(cluster: Cluster, finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "project")
    two = ("operation.ranks={train: 2}", "operation.nodes={train: 2}")
    project.pipestill("config", *EXPERIMENT, *two, "training.iterations=250", *EVERY_UPDATE)
    submitted = Submitted(cluster, project, f"{TEACHER}/manifest.json", **SLOWLY)

    job = submitted.wait_for_job()
    os.kill(cluster.rank(job, 1), signal.SIGKILL)
    job = submitted.wait_for_job(other_than=job)
    assert "rank 1 was ended by SIGKILL; its state is kept, start it again" in submitted.logs()

    cluster.call("scancel", job)
    job = submitted.wait_for_job(other_than=job)
    assert "stopped by SIGTERM after update" in submitted.logs()

    cluster.call("scontrol", "requeue", job)
    submitted.wait_for(lambda: not cluster.running())
    assert submitted.wait_for_job() == job, "Slurm starts it again by itself"

    cluster.kill("control")
    cluster.start_control()
    submitted.wait_for_updates()
    assert [number for number, _ in cluster.running()] == [job], "jobs go on without the controller"

    cluster.call("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    submitted.wait_for_updates()
    assert [number for number, _ in cluster.running()] == [job], "a drained node ends nothing"
    cluster.start_node("n3")
    cluster.call("scontrol", "requeue", job)
    assert submitted.wait_for_job(nodes="n[1,3]") == job, "it goes on without the drained node"

    cluster.call("scontrol", "update", "nodename=n2", "state=resume")
    lost = cluster.processes(job, "n3")
    for process in lost:
        os.kill(process, signal.SIGSTOP)  # a node that is lost answers nobody
    cluster.kill("n3")
    assert submitted.wait_for_job(nodes="n[1-2]") == job, "it goes on without the lost node"
    for process in lost:
        os.kill(process, signal.SIGKILL)

    row = next(row for row in json.loads(project.pipestill("status", "--json")) if row["stage"] == "train@teacher")
    assert (row["state"], row["job"], row["ranks"]) == ("running", job, 2)
    assert submitted.wait() == 0, f"{submitted.said}\n{submitted.logs()}"
    words = ["train", "--name", "teacher", "--dataset", project.root / "artifacts/dataset", "--nodes", 1]
    code, output = run(
        *words, "--output", tmp_path / "m", "--params", project.root / "params.yaml", runs=tmp_path / "r"
    )
    assert code == 0, output
    assert payload(project.root / TEACHER) == payload(tmp_path / "m")


def test_a_stage_that_fails_at_once_stops_after_two_attempts(
    cluster: Cluster, finished: Project, tmp_path: Path
) -> None:
    project = finished.copy(tmp_path / "project")
    project.edit("dvc.yaml", "pipestill report --dataset", "echo x >> count; python -c 'raise SystemExit(1)' --dataset")
    project.pipestill("config", *EXPERIMENT, *OVER_NODES, "report.title=Other")
    submitted = Submitted(cluster, project, "artifacts/report/manifest.json", "--retries", "3")
    assert submitted.wait() == 1, submitted.said
    assert (project.root / "count").read_text() == "x\nx\n"
    assert "report ended with 1" in submitted.said
    asked = Submitted(cluster, project, "artifacts/report/manifest.json", "--set-resources", "report:mem_mb=99000000")
    assert asked.wait() == 1, asked.said
    assert "Memory specification can not be satisfied" in asked.said
    row = json.loads(project.pipestill("status", "--json"))[-1]
    assert row["state"] == "failed"
    assert "given up: two attempts saved nothing" in row["why"]


def test_runs_of_an_array_have_one_node_each(cluster: Cluster, finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "project")
    over = ("operation.ranks={sample: 2}", "operation.nodes={sample: 2}", "sampling.runs.teacher-heun-3.seeds=[1]")
    project.pipestill("config", *EXPERIMENT, *over)
    submitted = Submitted(cluster, project, "artifacts/samples/teacher-heun-3/manifest.json")
    assert submitted.wait() == 1, submitted.said
    assert "operation.nodes.sample=2: jobs of an array have one node each" in submitted.said


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
        stand_in = forked.stand_in()
        python = stand_in / "python" if stand_in else sys.executable
        words = " ".join(f"'{word}'" for word in (python, "-m", "pipestill", *command))
        script = folder / f"{name}.sh"
        script.write_text(
            f"#!/bin/bash\nexport PIPESTILL_RUNS='{folder / 'runs'}' OMP_NUM_THREADS=1\n{words}\n"
            f"echo $? > '{folder / name}.part'\nmv '{folder / name}.part' '{folder / name}.code'\n"
        )
        log = folder / f"{name}.log"
        spread = ["--nodes=2", "--ntasks=2", "--cpus-per-task=2"]
        self.number = cluster.call("sbatch", "--parsable", *spread, f"--output={log}", script).strip()

    @property
    def said(self) -> str:
        return (self.folder / f"{self.name}.log").read_text(errors="replace")

    def wait(self) -> int:
        code = self.folder / f"{self.name}.code"
        self.cluster.wait_for(code.exists, 120)
        return int(code.read_text())

    def wait_for_updates(self, count: int) -> None:
        self.cluster.wait_for(lambda: steps_logged(self.folder / "runs") >= count, 120)


def test_a_request_to_stop_ends_every_node_and_fewer_nodes_go_on(
    cluster: Cluster, tmp_path: Path, digits: Path
) -> None:
    job = Job(cluster, tmp_path, "stopped", training(tmp_path, digits))
    job.wait_for_updates(10)
    os.kill(cluster.launcher(job.number), signal.SIGTERM)  # reaches the launcher alone
    assert job.wait() == 75, job.said
    assert "stopped by SIGUSR2 after update" in job.said or "stopped by SIGTERM after update" in job.said
    assert "state saved" in job.said

    job = Job(cluster, tmp_path, "limited", training(tmp_path, digits, "--deadline-min", 0))
    assert job.wait() == 75, job.said
    assert "stopped by its time limit after update" in job.said

    cluster.call("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    try:
        job = Job(cluster, tmp_path, "last", training(tmp_path, digits))
        cluster.call("scontrol", "update", f"jobid={job.number}", "numnodes=1", "numtasks=1", "numcpus=2")
        assert job.wait() == 0, job.said
    finally:
        cluster.call("scontrol", "update", "nodename=n2", "state=resume")
    assert f"job {job.number} has 1 of 2 nodes: 2 of 4 ranks share the same batches" in job.said
    assert "2 ranks" in job.said
    assert "going on after update" in job.said
    assert not list((tmp_path / "runs" / "scratch").iterdir())


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
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
    assert cli.main([str(word) for word in training(tmp_path, digits, *more)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
