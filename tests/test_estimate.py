"""How long a plan will take: the arithmetic by hand, the order of jobs, how a time is written, and the real command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipestill import configure
from pipestill.durations import duration
from pipestill.estimating import PUBLISHING, REPORT, Estimate, Sizes, Speeds, makespan
from workflow_project import TINY, Project

SIZES = Sizes(total=1000, train=550, validation=150, test=300)
SPEEDS = Speeds(
    start=2.0,
    decode=0.01,
    features=0.004,
    classifier=0.05,
    metrics=3.0,
    forward={"teacher": 0.002, "student-4": 0.002},
    update={"teacher": 0.5, "student-4": 1.5},
)
OVER = 2.0 + PUBLISHING


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (200, "3 min 20 s"), (599, "9 min 59 s")),
        *((600, "10 min"), (3569, "59 min"), (3599, "1 h"), (12000, "3 h 20 min"), (7200, "2 h"), (86370, "1 d")),
        *((86400, "1 d"), (190800, "2 d 5 h"), (30 * 86400, "30 d"), (-1, "0 s")),
    ],
)
def test_a_length_of_time_is_written_as_people_do(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("stage", "entry", "seconds"),
    [
        ("dataset", None, 1000 * 0.01),
        ("reference", None, 30 * 0.05 + 1000 * 0.004 + 1 * 2 * 3.0),  # classifier, features, two draws of one floor
        ("train", "teacher", 12 * 0.5 + 2 * 150 * 0.002),  # two validations
        ("tune", "teacher", 2 * 1 * 40 * (4 * 0.002 + 0.004)),  # two ranges of one solver of four steps
        ("distill", "student-4", 4 * 1.5 + 2 * 40 * (2 * 0.002 + 0.004)),
        ("sample", "teacher-2m-4", 40 * 4 * 0.002),
        ("sample", "student-4", 3 * 40 * 2 * 2 * 0.002),  # three seeds, two steps, guided
        ("evaluate", "student-4", 3 * (40 * 0.004 + 3.0)),
        ("report", None, REPORT),
    ],
)
def test_the_seconds_of_a_stage_are_those_of_its_steps(stage: str, entry: str | None, seconds: float) -> None:
    params = configure.compose([*TINY, "sampling.runs.student-4.guidance=1.5", "sampling.runs.student-4.seeds=[0,1,2]"])
    assert Estimate(params, SIZES, SPEEDS).seconds(stage, entry) == pytest.approx(OVER + seconds)


def test_ranks_share_the_work_and_cores_are_counted() -> None:
    params = configure.compose([*TINY, "operation.ranks={train: 2}", "training.threads=3"])
    estimate = Estimate(params, SIZES, SPEEDS)
    assert estimate.seconds("train", "teacher") == pytest.approx(OVER + (12 * 0.5 + 2 * 150 * 0.002) / 2)
    assert (estimate.cores("train", "teacher"), estimate.cores("report", None)) == (6, 1)


def test_what_was_not_measured_is_not_known() -> None:
    estimate = Estimate(configure.compose(TINY), SIZES, Speeds(start=2.0))
    assert estimate.seconds("train", "teacher") is None
    assert estimate.seconds("fetch", "edm") is None


def test_the_whole_takes_as_long_as_its_jobs_on_these_cores() -> None:
    seconds, cores = [10, 20, 30, 5], [1, 1, 1, 1]
    needs: list[list[int]] = [[], [0], [0], [1, 2]]
    assert makespan(seconds, cores, needs, 2) == 45  # 10, then 20 beside 30, then 5
    assert makespan(seconds, cores, needs, 1) == 65
    assert makespan(seconds, [1, 2, 1, 1], needs, 2) == 65  # the second wants both cores
    assert makespan([7], [8], [[]], 2) == 7
    assert makespan([], [], [], 2) == 0
    with pytest.raises(ValueError, match="wait for each other"):
        makespan([1, 1], [1, 1], [[1], [0]], 2)


def test_the_command_estimates_what_is_to_run(tiny: Project, tmp_path: Path) -> None:
    project = tiny.copy(tmp_path / "project")
    assert "nothing is to run" in project.pipestill("config", "--estimate")
    project.here("config", *TINY, "distillation.students.student-4.iterations=400")
    before = (project.root / "params.yaml").read_bytes()
    said = project.pipestill("config", "--estimate").splitlines()
    assert [line.split()[0] for line in said] == [
        *("distill@student-4", "sample@student-4", "evaluate@student-4", "report", "all")
    ]
    assert all(re.search(r"  (\d+ (s|min|h))( \d+ (s|min))?( on \d+ cores \(4 stages\))?$", line) for line in said), (
        said
    )
    assert (project.root / "params.yaml").read_bytes() == before


def test_snakemake_says_at_its_start_how_long_it_will_take(tiny: Project, tmp_path: Path) -> None:
    project = tiny.copy(tmp_path / "project")
    on = {"PIPESTILL_ESTIMATE": "1"}
    assert " cores (" not in project.snakemake(**on), "there is nothing to do"
    project.here("config", *TINY, "sampling.runs.student-4.seeds=[7]")
    assert " cores (" not in project.snakemake("--dry-run", **on)
    said = project.snakemake("artifacts/samples/student-4/manifest.json", **on)
    assert re.search(r"^all +\d+ s on \d+ cores \(1 stage\)$", said, re.MULTILINE)
