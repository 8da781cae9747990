"""DVC's experiments and comparisons: a queue over a parameter with a kill in it, metrics and plots between commits."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from commands import PATIENCE, payload
from pipestill.evaluation.headline import file_of
from workflow_project import ROOT, TINY, Project, dvc_stages, make_project

RATE = "distillation.students.student-4.generator_lr"
MODEL = Path("artifacts/models/student-4")
LONG = (
    *("distillation.students.student-4.iterations=24", "distillation.students.student-4.validation.every=24"),
    *("operation.save_every=0.01", "operation.log_every=1"),
)
AFTER_STUDENT = ("distill@student-4", "sample@student-4", "evaluate@student-4", "report")

QUEUE = 600.0  # seconds in which a queue of three has ended, or hangs

pytestmark = pytest.mark.timeout(900)


def experiments(project: Project) -> dict[str, tuple[str, float]]:
    """State and rate of each of DVC's experiments, by name."""
    shown = json.loads(project.dvc("exp", "show", "--json"))
    found = {}
    for experiment in next(entry for entry in shown if entry["rev"] != "workspace")["experiments"]:
        tree = experiment["revs"][-1]["data"]["params"]["params.yaml"]["data"]
        rate = tree["distillation"]["students"]["student-4"]["generator_lr"]
        found[experiment["name"]] = (experiment["executor"]["state"], float(rate))
    return found


def kill_in_mid_training(runs: Path, updates: int) -> None:
    """SIGKILL to the first stage that has made so many updates: the process that holds the lock of its work."""
    limit = time.monotonic() + 2 * PATIENCE  # DVC lays out three checkouts first
    while True:
        assert time.monotonic() < limit, "no stage got that far"
        for log in runs.glob("distill/*/log.jsonl"):
            lock = runs / "locks" / f"{log.parent.name}.lock"
            if len(log.read_text().splitlines()) < updates or (pid := holder(lock)) is None:
                continue
            with suppress(ProcessLookupError):  # it has ended: another one will do
                os.kill(pid, signal.SIGKILL)
                return
        time.sleep(0.02)


def holder(lock: Path) -> int | None:
    """The process that has a file open; None where none has."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile, or is not ours
            if any(descriptor.readlink() == lock for descriptor in (process / "fd").iterdir()):
                return int(process.name)
    return None


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """Ends what still works below the test's folder: DVC's queue has workers that no failure of ours would end."""
    yield
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (entry / "cwd").readlink().is_relative_to(tmp_path):
                os.kill(int(entry.name), signal.SIGKILL)


@pytest.mark.usefixtures("nothing_left")
def test_a_killed_experiment_of_a_queue_goes_on_when_it_is_queued_again(tiny: Project, tmp_path: Path) -> None:
    project, runs = tiny.copy(tmp_path / "project"), tmp_path / "runs"
    project.git("config", "user.name", "Test")
    project.git("config", "user.email", "test@localhost")
    project.here("config", *TINY, *LONG)
    project.commit("longer")
    rates = {"rate-1": "0.0001", "rate-2": "0.0002", "rate-3": "0.0003"}
    values = f"{RATE}={','.join(rates.values())}"
    project.dvc("exp", "run", "--queue", "--name", "rate", "--set-param", values, "distill@student-4")
    variables = {"PIPESTILL_RUNS": str(runs)}
    with ThreadPoolExecutor(1) as beside:
        killing = beside.submit(kill_in_mid_training, runs, 5)
        project.run("dvc", "exp", "run", "--run-all", "--jobs", "3", timeout=QUEUE, **variables)
        killing.result()
    found = experiments(project)
    assert {name: rate for name, (_, rate) in found.items()} == {name: float(rate) for name, rate in rates.items()}
    assert sorted(state for state, _ in found.values()) == ["failed", "success", "success"]
    (killed,) = [name for name, (state, _) in found.items() if state == "failed"]
    assert re.search("exited with (-9|137)", project.dvc("queue", "logs", killed)), "SIGKILL, as any shell says it"

    project.dvc("queue", "remove", "--failed")
    again = ("exp", "run", "--queue", "--name", killed, "--set-param", f"{RATE}={rates[killed]}", "distill@student-4")
    project.dvc(*again)
    said = project.run("dvc", "exp", "run", "--run-all", timeout=QUEUE, **variables)
    step = re.search(r"going on after update (\d+) of 24", said)
    assert step, said
    assert 1 <= int(step[1]) < 24
    assert {state for state, _ in experiments(project).values()} == {"success"}
    project.dvc("exp", "apply", killed)

    words = shlex.split(str(dvc_stages(tiny.root)["distill@student-4"]["command"]))[1:-1]
    tiny.copy(tmp_path / "undisturbed").here(*words, "out", *LONG, f"{RATE}={rates[killed]}")
    assert payload(project.root / MODEL) == payload(tmp_path / "undisturbed" / "out")


def test_metrics_and_plots_between_two_commits(tiny: Project, tmp_path: Path) -> None:
    project = tiny.copy(tmp_path / "project")
    project.here("config", *TINY, f"{RATE}=0.01")
    project.by_hand_here(*AFTER_STUDENT)
    project.here("record")
    project.commit("another rate")

    changes = json.loads(project.dvc("metrics", "diff", "--json", "HEAD~1", "HEAD"))
    old, new = (
        json.loads(project.git("show", f"{revision}:metrics/student-4.json")) for revision in ("HEAD~1", "HEAD")
    )
    assert set(changes) == {"metrics/student-4.json"}
    distance = changes["metrics/student-4.json"]["fd_classifier"]
    assert (distance["old"], distance["new"]) == (old["fd_classifier"], new["fd_classifier"])
    assert distance["old"] != distance["new"]

    shown = json.loads(project.dvc("plots", "diff", "--json", "HEAD~1", "HEAD"))
    assert not shown.get("errors")
    plots = {name: found[0]["content"] for name, found in shown["data"].items()}
    folder = "artifacts/report/plots"
    curves = {
        f"{folder}/loss/teacher.csv": ("update", "loss"),
        f"{folder}/fake_score_loss/student-4.csv": ("generator update", "fake score's loss"),
        f"{folder}/validation_distance/student-4.csv": ("generator update", "Fréchet distance on the validation part"),
    }
    assert plots.keys() == {"distance of each run", *curves}
    for name, plot in plots.items():
        rows = plot["data"]["values"]
        assert {row["rev"] for row in rows} == {"HEAD~1", "HEAD"}, name
        assert plot["title"]["text"] == name
    for name, labels in curves.items():
        text = json.dumps(plots[name], ensure_ascii=False)
        assert re.findall(r'"field": "step", "type": "quantitative", "title": "([^"]*)"', text)[0] == labels[0]
        assert f'"title": "{labels[1]}"' in text
        assert ('"name": "smooth"' in text) == ("loss" in name), "losses alone are noisy"
        assert '"color": {"field": "rev"' in text
    bars = plots["distance of each run"]
    assert bars["mark"]["type"] == "bar"
    assert bars["encoding"]["y"]["field"] == "run"
    assert bars["encoding"]["yOffset"]["field"] == bars["encoding"]["color"]["field"] == "rev"
    assert bars["encoding"]["x"]["title"] == "Fréchet distance (EfficientNet-Lite0)"
    before, after = (
        {row["run"]: float(row["fd_efficientnet_lite0"]) for row in bars["data"]["values"] if row["rev"] == revision}
        for revision in ("HEAD~1", "HEAD")
    )
    assert before["teacher-2m-4"] == after["teacher-2m-4"]
    assert before["student-4"] != after["student-4"]


def with_the_demos_metrics(root: Path) -> Project:
    """The demo's parameters and the metrics of all its runs, committed; nothing has run."""
    project = make_project(root)
    (root / "metrics").mkdir()
    for file in (ROOT / "metrics").glob("*.json"):
        (root / "metrics" / file.name).write_text(file_of([json.loads(file.read_text())]))
    project.commit("results")
    return project


def change_metrics(project: Project, *runs: str) -> None:
    for run in runs:
        path = project.root / "metrics" / f"{run}.json"
        body = json.loads(path.read_text())
        measured = {key: 0.87654321 * value for key, value in body.items() if key.startswith(("fd_", "class", "div"))}
        path.write_text(file_of([body | measured]))


def test_dvcs_tables_of_the_demos_metrics_are_narrow(tmp_path: Path) -> None:
    project = with_the_demos_metrics(tmp_path / "project")
    runs = sorted(file.stem for file in (project.root / "metrics").glob("*.json"))
    change_metrics(project, *runs)
    table = project.run("dvc", "metrics", "diff", COLUMNS="300").splitlines()
    rows = [line for line in table if line.startswith("metrics/")]
    assert {Path(row.split()[0]).stem for row in rows} == set(runs)
    assert max(map(len, table)) <= 100

    project.git("checkout", "--", "metrics")
    change_metrics(project, "student-10", "student-10-cfg15")  # what a parameter of that student changes
    project.commit("another student")
    head = project.dvc("exp", "show", "--num", "2", "--only-changed", "--csv").splitlines()[0].split(",")
    shown = [column for column in head if column.startswith("metrics/")]
    assert {column.partition(":")[0] for column in shown} == {
        f"metrics/{run}.json" for run in ("student-10", "student-10-cfg15")
    }
    assert len(shown) <= 8
