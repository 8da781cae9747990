"""dvc.yaml and the Snakefile say the same; mistakes are one line; attempts and repeats go by exit codes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from commands import can_mount
from pipestill import cli, pipeline, stopping, tools
from pipestill.commands import config as config_command
from pipestill.commands import doctor
from pipestill.errors import InputError, Stopped
from workflow_project import ROOT, TINY, Project, dvc_stages, make_project

ATTEMPT = ROOT / "workflow" / "scripts" / "attempt.sh"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A fresh checkout of the demo; the tests leave it as it is."""
    return make_project(tmp_path_factory.mktemp("fresh") / "project")


def stands_for(path: str, outputs: set[str]) -> set[str]:
    """The manifests that stand for a DVC dependency: of the output around it, or of all outputs in it."""
    around = {out for out in outputs if path == out or path.startswith(f"{out}/")}
    inside = {out for out in outputs if out.startswith(f"{path}/")}
    return {f"{out}/manifest.json" for out in around | inside} or {path}


@pytest.mark.parametrize("overrides", [(), ("experiment=digits_long",), ("experiment=own", "data.path=photos")])
def test_a_fresh_clone_plans_the_very_stages_of_dvc(overrides: tuple[str, ...], tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", *overrides)
    (project.root / "photos").mkdir()
    planned, stages = project.planned(), dvc_stages(project.root)
    assert planned.keys() == stages.keys()
    outputs = {out for stage in stages.values() for out in stage["outputs"]}
    for address, stage in stages.items():
        job = planned[address]
        assert job["command"] == stage["command"], address
        assert job["inputs"] == set().union(*(stands_for(path, outputs) for path in stage["dependencies"])), address
        (folder,) = stage["outputs"]
        assert f"{folder}/manifest.json" in job["outputs"], address
        assert all(file.startswith(f"{folder}/") for file in job["outputs"]), address


def test_committed_metrics_do_not_satisfy_a_fresh_clone(project: Project, tmp_path: Path) -> None:
    clone = project.copy(tmp_path / "clone")
    (clone.root / "metrics").mkdir()
    for entry in ("floor", "student-4"):
        (clone.root / "metrics" / f"{entry}.json").write_text("{}\n")
    assert clone.planned().keys() == dvc_stages(clone.root).keys()


def test_threads_come_from_the_parameters(tmp_path: Path) -> None:
    project = make_project(
        tmp_path / "project", "distillation.students.student-4.threads=2", "operation.ranks={train: 2}"
    )
    planned = project.planned("--cores", "8")
    assert planned["distill@student-4"]["threads"] == "2"
    assert planned["train@teacher"]["threads"] == "2"  # two ranks of one thread
    assert planned["distill@student-10"]["threads"] == "1"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "learning_rate: 0.002\n      optimizer",
            "learning_rte: 0.002\n      optimizer",
            "did you mean 'learning_rate'?",
        ),
        ("  resolution: 8\n", "  resolution: 3\n", "data.resolution=3: input should be greater than or equal to 4"),
    ],
)
def test_a_mistake_in_the_parameters_is_one_line(
    project: Project, tmp_path: Path, old: str, new: str, says: str
) -> None:
    wrong = project.copy(tmp_path / "wrong")
    wrong.edit("params.yaml", old, new)
    output = wrong.snakemake("--dry-run", code=1)
    (line,) = [line for line in output.splitlines() if says in line]
    assert "Traceback" not in output
    assert line.startswith("params.yaml: ")


def test_a_rate_as_dvc_writes_it_is_the_number_that_it_says(project: Project, tmp_path: Path) -> None:
    """`dvc exp run -S …=2e-5` writes 2e-05, which YAML 1.1 takes for a text."""
    edited = project.copy(tmp_path / "edited")
    text = (edited.root / "params.yaml").read_text()
    assert "generator_lr: 5.0e-05" in text
    (edited.root / "params.yaml").write_text(text.replace("generator_lr: 5.0e-05", "generator_lr: 2e-05"))
    assert edited.planned().keys() == dvc_stages(edited.root).keys()


def test_parameters_on_snakemakes_command_line_are_refused(project: Project) -> None:
    output = project.snakemake("--dry-run", "--config", "report={title: other}", code=1)
    assert "the stages read params.yaml alone" in output
    assert "Traceback" not in output


def test_without_git_there_is_one_clear_line(project: Project, tmp_path: Path) -> None:
    bare = project.copy(tmp_path / "bare")
    (bare.root / ".git").rename(tmp_path / "git")
    output = bare.snakemake("--dry-run", code=1)
    assert "is no git checkout" in output
    assert "Traceback" not in output
    with pytest.raises(InputError, match="git init"):
        pipeline.load(bare.root)
    assert bare.pipestill("record", code=2).count("\n") == 1


def test_elsewhere_than_at_the_root_there_is_one_clear_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipestill", "sync"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "has no dvc.yaml" in done.stderr


def attempt(number: int, log: Path, command: str) -> tuple[int, str]:
    arguments = ["bash", str(ATTEMPT), str(number), str(log), command]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_only_a_stage_that_stopped_with_its_state_saved_is_tried_again(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    count = tmp_path / "count"
    again = f"echo x >> {count}; echo words; [ $(wc -l < {count}) -ge 2 ] || exit 75"
    assert attempt(1, log, again) == (75, "words\n")
    assert attempt(2, log, again) == (0, "words\n")
    assert log.read_text() == "words\n"
    count.unlink()
    wrong = f"echo x >> {count}; exit 2"
    assert attempt(1, log, wrong)[0] == 2
    code, said = attempt(2, log, wrong)
    assert (code, count.read_text()) == (2, "x\n"), "a wrong input must not be tried again"
    assert said == ""
    assert "not tried again" in log.read_text()


def test_a_killed_attempt_is_not_taken_for_one_that_saved_its_state(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    assert attempt(1, log, "exit 75")[0] == 75
    assert attempt(2, log, f"kill -9 $PPID; cat {tmp_path}/none")[0] != 0
    assert "not tried again" in attempt(3, log, "exit 75")[1]


def test_a_stage_that_stops_leaves_word_for_repro(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(options: object) -> None:
        raise Stopped("stopped at its time limit")

    note = tmp_path / "stopped"
    monkeypatch.setenv(stopping.STOPPED, str(note))
    monkeypatch.setattr(config_command, "main", lambda options: None)
    assert cli.main(["config"]) == 0
    assert not note.exists()
    monkeypatch.setattr(config_command, "main", stop)
    assert cli.main(["config"]) == 75
    assert note.exists()


@pytest.mark.parametrize(("stops", "code"), [(2, 0), (9, 75)])
def test_repro_goes_on_after_time_limits_and_no_longer_than_asked(tmp_path: Path, stops: int, code: int) -> None:
    project = Project(tmp_path / "project")
    project.root.mkdir()
    script = (
        "import os, pathlib, sys\n"
        "state = pathlib.Path('state'); done = len(state.read_text()) if state.exists() else 0\n"
        f"if done < {stops}:\n"
        "    state.write_text('x' * (done + 1)); pathlib.Path(os.environ['PIPESTILL_STOPPED']).touch(); sys.exit(75)\n"
        "pathlib.Path('out').write_text('finished')\n"
    )
    (project.root / "stage.py").write_text(script)
    command = f"{sys.executable} stage.py"
    (project.root / "dvc.yaml").write_text(f"stages:\n  long:\n    cmd: {command}\n    outs:\n      - out\n")
    project.git("init", "--quiet")
    project.dvc("init", "--quiet")
    said = project.pipestill("repro", "--attempts", "4", code=code)
    assert said.count("goes on from there") == min(stops, 3)  # none goes on after the last
    assert (project.root / "out").exists() == (code == 0)


def test_repro_does_not_repeat_a_failure(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    project.root.mkdir()
    (project.root / "dvc.yaml").write_text(
        "stages:\n  wrong:\n    cmd: echo x >> count; exit 2\n    outs:\n      - out\n"
    )
    project.git("init", "--quiet")
    project.dvc("init", "--quiet")
    assert "the stage's own message stands above" in project.pipestill("repro", code=3)
    assert (project.root / "count").read_text() == "x\n"


def test_what_a_killed_snakemake_locked_is_unlocked(project: Project, tmp_path: Path) -> None:
    killed = project.copy(tmp_path / "killed")
    killed.edit("dvc.yaml", "cmd: pipestill example", "cmd: read -rt 60 < /dev/zero; pipestill example")
    target = "data/digits/manifest.json"
    words = [Path(sys.executable).with_name("snakemake"), "--profile", "local", target]
    nothing = subprocess.DEVNULL
    running = subprocess.Popen(words, cwd=killed.root, stdout=nothing, stderr=nothing, start_new_session=True)
    try:
        while not list((killed.root / ".snakemake").glob("locks/*")):
            assert running.poll() is None
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)  # its job too, which would go on
        running.wait()
    assert "Directory cannot be locked" in killed.snakemake(target, code=1)
    assert "warn  Snakemake's lock is held" in killed.pipestill("doctor", "--quick", code=0)
    killed.git("checkout", "dvc.yaml")
    killed.snakemake("--unlock")
    killed.snakemake(target)
    assert killed.payloads().keys() == {"data/digits"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "Having any troubles?\nERROR: failed to transfer 'e3f9' - [Errno 28] No space left on device: 'a'\n",
            "No space left on device: 'a': free some space and start this again",
        ),
        ("ERROR: unexpected error - [Errno 13] Permission denied: 'b'\n", "Permission denied: 'b'"),
        ("  \nERROR: output 'x' does not exist\nmore\n", "output 'x' does not exist"),
        ("words\n", "words"),
        ("", "it said nothing"),
    ],
)
def test_what_a_tool_failed_for_is_found_in_what_it_said(text: str, reason: str) -> None:
    assert tools._reason(text) == reason


@pytest.mark.skipif(not can_mount(), reason="no mount namespace here")
def test_record_on_a_full_disk_says_so(tiny: Project, tmp_path: Path) -> None:
    project = tiny.copy(tmp_path / "project")
    cache = project.root / "full"
    cache.mkdir()
    project.dvc("config", "--local", "cache.dir", str(cache / "cache"))
    mounted = f"mount -t tmpfs -o size=300k tmpfs {cache}; exec {sys.executable} -m pipestill record"
    said = project.run("unshare", "-rm", "sh", "-c", mounted, code=3)
    (line,) = [line for line in said.splitlines() if "not recorded" not in line]
    assert line.startswith("pipestill record: dvc commit ")
    assert "No space left on device" in line
    assert line.endswith(": free some space and start this again")


def test_doctor_names_images_that_a_queued_experiment_would_miss(
    tiny: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tiny.copy(tmp_path / "project")
    monkeypatch.chdir(project.root)
    assert list(doctor.experiments(project.root)) == []
    (project.root / "photos" / "a").mkdir(parents=True)
    (project.root / "photos" / "a" / "1.png").write_bytes(b"")
    project.here("config", *TINY, "data.path=photos")
    (line,) = doctor.experiments(project.root)
    assert line.state == "warn"
    assert line.text.startswith("photos is not tracked by git or DVC: dvc exp run --queue and --temp will not find it")
    (project.root / "photos.dvc").touch()
    assert list(doctor.experiments(project.root)) == []
    (project.root / "photos.dvc").unlink()
    project.git("add", "photos")
    assert list(doctor.experiments(project.root)) == []
    project.here("config", *TINY, f"data.path={project.root / 'photos'}")
    project.git("rm", "--quiet", "-r", "--cached", "photos")
    assert list(doctor.experiments(project.root)) == []
    title = f"images of {project.root / 'photos'}"
    project.here("config", *TINY, "data.path=photos", f'report.title="{title}"')
    assert len(list(doctor.experiments(project.root))) == 1, "a title names no folder"
    monkeypatch.setattr(doctor.shutil, "which", lambda program: None)
    assert list(doctor.experiments(project.root)) == [], "without git it cannot tell"


def test_one_wrong_input_is_reported_once(tiny: Project, tmp_path: Path) -> None:
    """Its line stands at the end; what Snakemake makes of it stands in its log, and other jobs go on."""
    wrong = tiny.copy(tmp_path / "wrong")
    wrong.here("config", *TINY, "reference.floor.counts=[40,100000]", "training.iterations=13")
    said = wrong.snakemake("artifacts/reference/manifest.json", "artifacts/models/teacher/manifest.json", code=1)
    message = "as many cannot be drawn"
    (line,) = [line for line in said.splitlines() if message in line]
    assert line.startswith("reference ended with 2: pipestill reference: ")
    lines = said.rstrip().splitlines()
    assert lines.index(line) >= len(lines) - 6, said
    assert "Finished jobid" in said
    assert "train teacher: 13/13" in said
    noise = ("RuleException", "Trying to restart job", "Exiting because a job execution failed", "not tried again")
    for text in noise:
        assert text not in said
    (log,) = sorted((wrong.root / ".snakemake" / "log").glob("*.log"))[-1:]
    assert [log.read_text().count(text) for text in noise] == [4, 3, 1, 0]
    kept = (wrong.root / "runs/logs/reference/all.log").read_text()
    assert message in kept
    assert "not tried again" in kept


def test_record_inside_a_dvc_stage_does_nothing(project: Project) -> None:
    said = project.pipestill("record", DVC_STAGE="dvc.yaml:train")
    assert "DVC records by itself" in said
    assert not (project.root / "dvc.lock").exists()


def test_nodes_and_ranks_of_a_stage_reach_the_scheduler(tmp_path: Path) -> None:
    """A job of two nodes with a task for each and the threads of one node's ranks; one node is no MPI job."""
    over = ("operation.ranks={train: 4, distill: 2}", "operation.nodes={train: 2}")
    text = make_project(tmp_path / "project", "experiment=miniature", *over).snakemake("--dry-run", "--quiet", "host")
    blocks = {
        re.search(r"rule (\w+):", block)[1]: block  # type: ignore[index]
        for block in re.split(r"^\[.*\]\n", text, flags=re.MULTILINE)[1:]
    }
    resources = dict(re.findall(r"(\w+)=([^,\n]+)", blocks["train"]))
    assert (resources["nodes"], resources["mpi"], resources["tasks"]) == ("2", "srun", "2")
    assert "threads: 2" in blocks["train"]
    assert "nodes=1" in blocks["distill"]
    assert "mpi" not in blocks["distill"]
    assert "threads: 2" in blocks["distill"]


def test_the_profile_for_ci_plans_all(project: Project) -> None:
    said = project.run("snakemake", "--profile", "cluster_profiles/ci", "--dry-run")
    assert f"{len(dvc_stages(project.root)) + 1}" in re.findall(r"^total +(\d+)$", said, re.MULTILINE)
