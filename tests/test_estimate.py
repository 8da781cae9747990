"""How long a plan will take: the arithmetic by hand, the order of jobs, how a time is written, and the real command."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from images import class_folders
from pipestill import configure, distributed, planning
from pipestill.diffusion.edm import EDM
from pipestill.distillation.dmd2 import Distillation
from pipestill.durations import duration
from pipestill.estimating import PUBLISHING, REPORT, Estimate, Sizes, Speeds, makespan
from pipestill.training import trial
from pipestill.training.teacher import TeacherTraining
from pipestill.training.trial import Trial
from workflow_project import TINY, Project

SIZES = Sizes(total=1000, train=550, validation=150, test=300)
SPEEDS = Speeds(
    start=2.0,
    decode=0.01,
    features={1: 0.004},
    classifier=0.05,
    metrics={1: 3.0},
    forward={("teacher", 1): 0.002, ("student-4", 1): 0.002, ("teacher", 3): 0.001},
    update={"teacher": 0.5, "student-4": 1.5},
)
OVER = 2.0 + PUBLISHING
UPDATE, TURN, CALL = 0.5, 1.5, 0.002  # seconds of a teacher's and a student's update, and of an image's evaluation
FACTOR = 1.5  # by which an estimate may miss
UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


class Clock:
    """A clock that goes only where a step says what it costs."""

    def __init__(self) -> None:
        self.now = 1000.0

    def read(self) -> float:
        return self.now

    process_time = perf_counter = monotonic = time = read


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Every step of a network has a known cost, whatever this machine does meanwhile."""
    made = Clock()

    def costs(owner: type, name: str, seconds: Callable[..., float]) -> None:
        def step(self: Any, *arguments: Any) -> Any:
            made.now += seconds(*arguments) * torch.get_num_threads()  # of processor time
            return arguments[0]

        monkeypatch.setattr(owner, name, step)

    costs(TeacherTraining, "update", lambda step: UPDATE)
    costs(Distillation, "update", lambda step: TURN)
    costs(EDM, "forward", lambda x, sigma, condition: CALL * len(x))
    for module in (trial, planning):
        monkeypatch.setattr(module, "time", made)
    return made


def bomb() -> bytes:
    """A PNG that says it has 60,000 x 60,000 pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0"))]
    body = [
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


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
    assert Estimate(params, SIZES, SPEEDS, 2).seconds(stage, entry) == pytest.approx(OVER + seconds)


def test_ranks_share_the_work_and_cores_are_counted() -> None:
    params = configure.compose([*TINY, "operation.ranks={train: 2}", "training.threads=3"])
    estimate = Estimate(params, SIZES, SPEEDS, 6)
    work = 12 * 0.5 + 2 * 150 * 0.001  # forward passes with as many threads as the training has
    assert estimate.seconds("train", "teacher") == pytest.approx(OVER + work / 2)
    assert (estimate.cores("train", "teacher"), estimate.cores("report", None)) == (6, 1)
    crowded = Estimate(params, SIZES, SPEEDS, 2)
    assert crowded.seconds("train", "teacher") == pytest.approx(OVER + 3 * work / 2), "six threads on two cores"
    assert crowded.seconds("report", None) == pytest.approx(OVER + REPORT)


def test_what_was_not_measured_is_not_known() -> None:
    params = configure.compose(TINY)
    estimate = Estimate(params, SIZES, Speeds(start=2.0), 2)
    assert estimate.seconds("train", "teacher") is None
    assert estimate.seconds("fetch", "edm") is None
    assert estimate.seconds("reference", None) is None, "weights of an extractor that are still to be fetched"
    unknown = Estimate(params, None, SPEEDS, 2)
    assert unknown.seconds("dataset", None) is None
    assert unknown.seconds("sample", "teacher-2m-4") == pytest.approx(OVER + 40 * 4 * 0.002)


def test_without_labels_no_classifier_is_counted() -> None:
    found = configure.compose(TINY)
    plans = [f"sampling.runs.{name}.plan=none" for name in found.sampling.runs]
    params = configure.compose(
        [*TINY, "data.labels=false", "reference.protocol.extractors=[efficientnet_lite0]", *plans], whole=False
    )
    floors = len(params.reference.floor.counts) * len(params.reference.floor.plans) * params.reference.floor.draws
    wanted = OVER + 1000 * 0.004 + floors * 3.0
    assert Estimate(params, SIZES, SPEEDS, 2).seconds("reference", None) == pytest.approx(wanted)


# --- what there is to count -----------------------------------------------------------------------------------------


def images_of(place: Path, *overrides: str) -> planning.Images:
    own = ["experiment=own", f"data.path={place}", "data.resolution=8", *overrides]
    return planning.images_of(place.parent, configure.compose(own))


def test_images_that_are_here_are_counted_and_odd_files_hold_up_nothing(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "photos", each=6)
    os.mkfifo(folder / "a" / "x.png")  # opening it would wait for ever
    (folder / "a" / "y.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    (folder / "b" / "z.png").write_bytes(bomb())
    found = images_of(folder)
    assert found.sizes is not None
    assert (found.sizes.total, found.classes) == (14, 2)
    assert 0 < found.decode < 1


def test_images_in_an_array_are_counted(tmp_path: Path) -> None:
    pixels, labels = np.zeros((30, 8, 8, 3), np.uint8), np.arange(30) % 5
    np.savez(tmp_path / "images.npz", images=pixels, labels=labels)
    found = images_of(tmp_path / "images.npz", "data.format=npz")
    assert found.sizes == Sizes(30, 30 - 4 - 9, 4, 9)
    assert found.classes == 5


def test_images_that_are_still_to_come_are_as_many_as_expected_or_not_known(tmp_path: Path) -> None:
    assert images_of(tmp_path / "later").sizes is None
    assert images_of(tmp_path / "later", "data.format=edm").sizes is None
    found = images_of(tmp_path / "later", "data.format=edm", "data.expect={images: 1000, classes: 7}")
    assert found.sizes is not None
    assert (found.sizes.total, found.classes) == (1000, 7)
    digits = planning.images_of(tmp_path, configure.compose(TINY))
    assert digits.sizes is not None
    assert (digits.sizes.total, digits.classes) == (1797, 10)


@pytest.mark.parametrize(
    ("path", "example"),
    [
        *(("data/digits", "digits"), ("data/digits/", "digits"), ("./data/digits/train", "digits")),
        *(("data/digits-own", None), ("data", None), ("photos/data/digits", None)),
    ],
)
def test_an_example_is_told_by_whole_names_of_folders(path: str, example: str | None) -> None:
    assert configure.compose([*TINY, f"data.path={path}"]).example == example


# --- what is measured -----------------------------------------------------------------------------------------------


def test_timings_have_their_stages_threads_and_lack_what_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = ("training.threads=2", "evaluation.threads=3", "reference.protocol.extractors=[classifier,inception]")
    params = configure.compose([*TINY, *threads])
    with distributed.world(device="cpu", threads=1) as world:
        trial = Trial(params, 10, world, budget=0.0)
        seen: list[int] = []
        monkeypatch.setattr(trial, "_seconds", lambda work: seen.append(torch.get_num_threads()) or 1.0)
        found = trial.speeds([("train", "teacher"), ("sample", "teacher-2m-4"), ("evaluate", "student-4")], None, 1, 1)
    assert found.forward.keys() == {("teacher", 2), ("teacher", 1)}
    assert set(seen) == {1, 2, 3}
    assert found.metrics.keys() == {3}
    assert found.features == {}, "Inception's weights are not here"
    assert Estimate(params, SIZES, found, 2).seconds("evaluate", "student-4") is None


def test_a_plan_without_runs_has_no_metrics_to_time() -> None:
    names = configure.compose(TINY).sampling.runs
    params = configure.compose([*TINY, *(f"~sampling.runs.{name}" for name in names)])
    with distributed.world(device="cpu", threads=1) as world:
        assert Trial(params, 10, world, budget=0.0).speeds([("reference", None)], SIZES, 1, 1).metrics == {1: 0.0}


def test_what_goes_round_in_a_circle_is_one_line(tiny: Project, tmp_path: Path) -> None:
    project = tiny.copy(tmp_path / "project")
    body = yaml.safe_load((project.root / "params.yaml").read_text())
    body["distillation"]["students"]["student-4"]["teacher"] = "student-4"
    (project.root / "params.yaml").write_text(yaml.safe_dump(body))
    said = project.pipestill("config", "--estimate", "--stages", "distill@student-4", code=2)
    assert "distillation.students.student-4.teacher: 'student-4' is no teacher" in said


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
    assert "nothing to run" in project.pipestill("config", "--estimate")
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
    assert " cores (" not in project.snakemake("--touch", "artifacts/samples/student-4/manifest.json", **on)
    project.here("config", *TINY, "sampling.runs.student-4.seeds=[8]")
    said = project.snakemake("artifacts/samples/student-4/manifest.json", **on)
    assert re.search(r"^all +\d+ s on \d+ cores \(1 stage\)$", said, re.MULTILINE)


def seconds_in(text: str) -> float:
    """The length of time that a line of the estimate names, in seconds."""
    said = text.split(" on ")[0].partition("  ")[2]
    return float(sum(int(count) * UNITS[unit] for count, unit in re.findall(r"(\d+) (s|min|h|d)\b", said)))


def test_what_the_command_says_is_what_known_steps_cost(tiny: Project, tmp_path: Path, clock: Clock) -> None:
    """A teacher of 1200 updates and a student of 400, whose steps take as long as the clock says."""
    project = tiny.copy(tmp_path / "project")
    project.here(
        *("config", *TINY),
        "teachers.teacher.training.iterations=1200",
        "distillation.students.student-4.iterations=400",
    )
    summary = json.loads((project.root / "artifacts/dataset/manifest.json").read_text())["summary"]
    lines = project.here("config", "--estimate").splitlines()
    said = {line.split()[0]: seconds_in(line) for line in lines if "  " in line}
    train = 1200 * UPDATE + 200 * summary["parts"]["validation"] * CALL
    distill = 400 * TURN + 200 * 40 * 2 * CALL
    for address, costs in (("train@teacher", train), ("distill@student-4", distill), ("all", train + distill)):
        assert costs / FACTOR < said[address] < costs * FACTOR, (address, costs, lines)


def test_measuring_ends_with_its_budget(clock: Clock) -> None:
    """Beyond the budget goes the step that was begun within it; what was not reached is told from the network."""
    params = configure.compose(TINY)
    stages = [("train", "teacher"), ("distill", "student-4"), ("sample", "teacher-2m-4")]
    for budget in (0.0, 1.0, 3.0):
        begun = clock.now
        with distributed.world(device="cpu", threads=1) as world:
            found = Trial(params, 10, world, budget=budget).speeds(stages, SIZES, 0.0, 0.0)
        assert clock.now - begun <= budget + 2 * TURN + 2 * UPDATE, budget
        assert found.forward["teacher", 1] == pytest.approx(CALL)
        assert found.update["teacher"] > 0
        assert found.update["student-4"] > 0


def test_what_is_cheap_is_timed_even_without_a_budget() -> None:
    params = configure.compose(TINY)
    with distributed.world(device="cpu", threads=1) as world:
        found = Trial(params, 10, world, budget=0.0).speeds([("reference", None)], SIZES, 0.0, 0.0)
    assert min(found.features[1], found.classifier, found.metrics[1]) > 0
