"""The report artefact: the right figures, the right comparisons, the same bytes, and a page that shows them."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import report_artifacts
from pipestill import artifacts, cli, previews
from pipestill.config import Params, check
from pipestill.errors import InputError
from pipestill.reporting import card, figures, gather, grids, results
from pipestill.reporting.table import results_table
from pipestill.sampling import pictures
from pipestill.stages.report import report
from pipestill.work import run_folder

VOID = {"meta", "link", "img", "br", "input", "hr"}
SVG_VOID = {"path", "rect", "circle", "polygon"}


class Page(HTMLParser):
    """Text, attributes and balance of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes), f"an attribute twice in {tag}"
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in SVG_VOID, f"<{tag}/> is no HTML"
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if {"td", "th"} & set(self.open) and self.rows:
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def make(root: Path, params: Params, output: str = "report", **changes: Any) -> tuple[dict[str, Any], str]:
    """Makes a report; returns its body and its page."""
    artifact = report(params, places=report_artifacts.places(root), output=root / output, **changes)
    body = json.loads((artifact.path / "report.json").read_text())
    return body, (artifact.path / "index.html").read_text()


@dataclass(frozen=True)
class Made:
    """Artefacts that tests only read, and the report made from them."""

    root: Path
    params: Params
    body: dict[str, Any]
    text: str


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPESTILL_RUNS", str(root / "runs"))
        params = report_artifacts.build(root, seeds=5)
        return Made(root, params, *make(root, params))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
    return tmp_path


def test_what_a_training_warned_of_stands_with_its_curves(made: Made) -> None:
    warned = {model["name"]: model["warnings"] for model in made.body["models"]}
    assert warned.pop("teacher") == [report_artifacts.WARNING]
    assert not any(warned.values())
    assert made.text.count(f'<p class="notice">{report_artifacts.WARNING}</p>') == 1


# --- figures ------------------------------------------------------------------------------------------------------


def test_leaders_are_unbeaten_at_their_number_of_evaluations() -> None:
    runs = [
        ("far", {"evaluations": 79, "fd": 1.5, "intervals": {"fd": [1.4, 1.6]}}),
        ("ten", {"evaluations": 10, "fd": 1.4, "intervals": {"fd": [1.3, 1.5]}}),
        ("worse", {"evaluations": 10, "fd": 1.7, "intervals": {"fd": [1.6, 1.8]}}),
        ("four", {"evaluations": 4, "fd": 9.0}),
        ("also four", {"evaluations": 4, "fd": 9.5}),
        ("alone", {"evaluations": 1, "fd": 40.0}),
        ("unmeasured", {"evaluations": 1}),
    ]
    assert figures.leaders(runs, "fd") == {"far": "level", "ten": "best", "four": "best"}


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "–"), (0.0, "0"), (1.2345, "1.23"), (0.012345, "0.0123"), (123.4, "123"), (-0.5, "−0.500")],
)
def test_numbers_read_in_three_digits(number: float | None, text: str) -> None:
    assert figures.short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (4e-5, "40.0 µs"), (0.0042, "4.20 ms"), (3.0, "3.00 s"), (600, "10 min"), (9000, "2 h 30 min")],
)
def test_durations_read_in_the_unit_that_fits(seconds: float | None, text: str) -> None:
    assert figures.duration(seconds) == text


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ([0.92, 1.5, None, 14.9], 2),
        ([0.94, 153.9], 2),
        ([7.7, 638.9], 1),
        ([140.0, 300.0], 0),
        ([0.42, 0.97], 3),
        ([0.0002, 0.003], 4),
        ([None, 0.0], 2),
    ],
)
def test_a_column_has_as_many_decimals_as_its_values_need(values: list[float | None], places: int) -> None:
    assert figures.decimals(values) == places


# --- grids --------------------------------------------------------------------------------------------------------


def test_grids_show_the_first_images_of_each_class() -> None:
    labels = np.array([1, 0, 1, 1, 0, 1])
    assert pictures.pick_items(labels, [0, 1], 3, 10) == [1, 4, None, 0, 2, 3]
    assert pictures.pick_items(np.full(3, -1), [], 2, 2) == [0, 1, 2, None]


def test_many_classes_are_spread_evenly() -> None:
    assert pictures.pick_classes(range(10), 10) == list(range(10))
    assert pictures.pick_classes(range(1000), 5) == [0, 250, 500, 749, 999]


def test_tiles_hold_the_pixels_and_transparent_gaps() -> None:
    image = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16, 1)
    picture = grids.tile([image, None, image], 2)
    assert picture.shape == (33, 33, 2)
    assert np.array_equal(picture[:16, :16, :1], image)
    assert np.array_equal(picture[17:, :16, :1], image)
    assert picture[:16, :16, 1].min() == 255
    assert picture[:16, 16:, 1].max() == 0


def test_large_pictures_are_small_files_and_few_columns() -> None:
    assert grids.fitting_columns(8, 10) == 10
    assert grids.fitting_columns(64, 20) == 10
    assert grids.fitting_columns(512, 10) == 5
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    content, ending = grids.encode(grids.tile([noise] * 64, 8))
    assert ending == "webp"
    assert Image.open(io.BytesIO(content)).size == (8 * 64 + 7 * 4, 8 * 64 + 7 * 4)


# --- the artefact -------------------------------------------------------------------------------------------------


def test_rows_carry_the_evaluations_figures(made: Made) -> None:
    body = made.body
    assert [run["name"] for run in body["runs"]][:3] == ["teacher-heun-79", "student-10-cfg15", "student-10"]
    student = next(run for run in body["runs"] if run["name"] == "student-4")
    assert student["metrics"]["fd_classifier"] == 2.36
    assert student["metrics"]["excess_fd_efficientnet_lite0"] == 4.66
    assert (student["role"], student["sampler"], student["steps"]) == ("student", "euler", 4)
    assert body["floors"][0]["metrics"]["fd_classifier"] == 0.92
    assert body["floors"][0]["intervals"]["fd_classifier"] == [0.81, 1.04]
    assert not [key for run in body["runs"] for key in run["metrics"] if "seconds" in key]


def test_students_are_compared_with_the_teachers_best_at_their_budget(made: Made) -> None:
    body = made.body
    found = {(c["run"], c["extractor"]): c for c in body["comparisons"]}
    ten = found["student-10", "classifier"]
    assert ten["same_budget"] == {"run": "teacher-2m-10", "distance": 1.93, "evaluations": 10}
    assert ten["any_budget"] == {"run": "teacher-heun-79", "distance": 1.52, "evaluations": 79}
    assert found["student-10-cfg15", "classifier"]["same_budget"]["run"] == "teacher-2m-10"
    assert found["student-4", "efficientnet_lite0"]["same_budget"]["run"] == "teacher-2m-4"
    assert body["verdict"] == (
        "student-10: distance 1.61 at 10 evaluations an image, against the teacher's best of 1.93 at no more and 1.52 "
        "at 79; real images score 0.920 (classifier features)."
    )


@pytest.mark.parametrize(("distance", "far"), [(4.5, False), (4.7, True)])  # the floor is 0.92
def test_an_untrained_teacher_is_not_held_up_as_a_rival(made: Made, distance: float, far: bool) -> None:
    runs, compared = (
        made.body["runs"],
        [entry | {"any_budget": entry["any_budget"] | {"distance": distance}} for entry in made.body["comparisons"]],
    )
    assert ("train it longer" in gather.verdict(runs, compared, made.body["extractors"])) == far


def test_runs_of_different_class_mixes_are_not_ranked_against_each_other(tmp_path: Path) -> None:
    """Three runs in the mix of the data, where the floor is twice as high, among balanced ones."""
    own = ("teacher-heun-79", "student-4", "teacher-2m-4")
    note = "classes without images are left out: <9>"
    mixes = dict.fromkeys(own, "data")
    params = report_artifacts.build(tmp_path, mixes=mixes, notes={"teacher-2m-4": [note]})
    body, page = make(tmp_path, params)
    found = {one["run"]: one for one in body["comparisons"] if one["extractor"] == "classifier"}
    assert found["student-10"]["any_budget"] == {"run": "teacher-2m-10", "distance": 1.93, "evaluations": 10}
    assert found["student-4"]["any_budget"] == {"run": "teacher-heun-79", "distance": 1.52, "evaluations": 79}
    assert found["student-4"]["same_budget"]["run"] == "teacher-2m-4"
    assert (found["student-4"]["mix"], found["student-10"]["mix"]) == ("data", "balanced")
    assert body["verdict"] == (
        "Among runs with plan=data, student-4: distance 2.36 at 4 evaluations an image, against the teacher's best of "
        "6.71 at no more and 1.52 at 79; real images score 0.920 (classifier features). "
        "Among runs with plan=balanced, student-10: distance 1.61 at 10 evaluations an image, against the teacher's "
        "best of 1.93 at 10 evaluations; real images score 0.920 (classifier features)."
    )
    rows = {row[0].split()[0]: row for row in Page(page).rows if row and row[0].strip()}
    head = next([cell.strip() for cell in row] for row in Page(page).rows if "Evaluations" in map(str.strip, row))
    place = head.index("Distance")
    best = {name for name, row in rows.items() if len(row) > place and "lowest at its number" in row[place]}
    assert best == {"teacher-heun-79", "student-4", "student-10", "teacher-heun-9", "teacher-renoise-4"}
    assert "classes as in the data" in rows["student-4"][0]
    assert note in rows["teacher-2m-4"][0]
    assert "classes as" not in rows["student-10"][0]
    chart = results.distance_chart(body, "classifier")
    assert chart is not None
    assert "Lowest" not in chart.description
    texts = (
        "real against real 0.920, 100 images, balanced",
        "real against real 1.84, 100 images, classes as in the data",
    )
    assert tuple(rule.label for rule in chart.rules) == texts


def test_of_runs_with_different_counts_the_one_nearest_to_its_own_floor_leads(made: Made) -> None:
    """1,000 images score lower than 100 do, real ones too."""
    compared = [dict(entry) for entry in made.body["comparisons"]]
    for entry in compared:
        if entry["run"] == "student-4":
            entry |= {"distance": 1.65, "floor": 1.4}  # 0.25 above; student-10 is 0.69 above its 0.92
    assert gather.verdict(made.body["runs"], compared, made.body["extractors"]).startswith("student-4: distance 1.65")


def test_students_that_differ_in_their_seed_alone_are_one_row(tmp_path: Path) -> None:
    repeated = {"student-4-b": (4, 2.60, 9.20, 0.98, 0.92), "student-4-c": (4, 2.66, 9.50, 0.98, 0.92)}
    params = report_artifacts.build(tmp_path, runs=report_artifacts.RUNS | repeated, seeds=2)
    body, page = make(tmp_path, params, "report")
    (entry,) = body["repeats"]
    assert entry["runs"] == ["student-4", "student-4-b", "student-4-c"]
    assert (entry["name"], entry["evaluations"], entry["guidance"]) == ("student-4", 4, 1)
    found = entry["spaces"]["classifier"]
    assert found["values"] == [2.36, 2.60, 2.66]
    assert found["mean"] == pytest.approx(2.54)
    half = 4.302653 * np.std([2.36, 2.60, 2.66], ddof=1) / np.sqrt(3)  # Student's t at 0.975, two degrees of freedom
    assert found["interval"] == pytest.approx([2.54 - half, 2.54 + half], rel=1e-5)
    assert found["same_budget"]["run"] == "teacher-2m-4"
    (row,) = [row for row in Page(page).rows if row[0].startswith("student-43")]
    assert row[:4] == ["student-43 training seeds", "4", "2.54[2.15, 2.93]", "6.71teacher-2m-4"]


def test_curves_split_and_chain_are_those_of_the_artefacts(made: Made) -> None:
    body = made.body
    teacher, student = body["models"][0], body["models"][1]
    assert [model["name"] for model in body["models"]] == ["teacher", "student-10", "student-4"]
    assert len(teacher["curves"]["loss"]) == 200
    assert [step for step, _ in teacher["curves"]["validation_loss"]] == list(range(200, 2001, 200))
    assert student["curves"]["validation_distance"][-2] == [250, pytest.approx(3 + 4 + 0.16)]
    assert body["dataset"]["split"]["test"] == [6] * 10
    chain = {link["name"]: link for link in body["chain"]}
    sampled = chain["evaluations/student-4"]["inputs"]["samples"]["payload"]
    assert sampled == chain["samples/student-4"]["payload"]
    assert chain["samples/student-4"]["inputs"]["model"]["payload"] == chain["models/student-4"]["payload"]
    for name, link in chain.items():
        assert link["payload"] == artifacts.read(made.root / name, link["kind"]).manifest.payload


def test_the_artefact_does_not_depend_on_place_or_times_and_the_page_beside_the_runs_shows_them(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = report_artifacts.build(runs)
    body, page = make(runs, params, "first")
    full = tmp_path / "runs" / "report" / "index.html"
    plain = full.read_text()
    assert "Time per image" in plain
    assert "Time per image" not in page
    assert str(full) in capsys.readouterr().err
    key = artifacts.read(runs / "samples" / "student-4", "samples").manifest.key
    folder = run_folder("sample", key)
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps({"seconds_per_image": 0.00321, "finished": True}))
    student = artifacts.read(runs / "models" / "student-4", "model").manifest
    pictures = previews.folder("student-4", student.key)
    pictures.mkdir(parents=True)
    for step in range(10, 140, 10):
        Image.new("L", (4, 4), step).save(pictures / f"step-{step:08d}.png")
    _, later = make(runs, params, "second/report")
    first, second = (artifacts.read(runs / place, "report") for place in ("first", "second/report"))
    assert first.manifest.to_json() == second.manifest.to_json()
    assert "index.html" in first.manifest.files
    assert page == later
    text = full.read_text()
    assert "3.21 ms" in text
    assert re.findall(r"Preview of student-4 after update (\d+)", text) == ["10", "40", "70", "100", "130"]
    shown = base64.b64encode((pictures / "step-00000130.png").read_bytes()).decode()
    assert f'src="data:image/png;base64,{shown}" alt="Preview of student-4 after update 130"' in text
    assert Page(text).rows
    assert str(tmp_path) not in (runs / "first" / "report.json").read_text()
    assert body["grids"]["runs"]["student-4"] == {"file": "grids/student-4.png", "images": 60}


def test_a_second_call_finds_it_done(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = report_artifacts.build(runs)
    make(runs, params)
    page = runs / "report" / "index.html"
    before = page.stat().st_mtime_ns
    full = runs / "runs" / "report" / "index.html"
    full.unlink()
    make(runs, params)
    assert page.stat().st_mtime_ns == before
    assert full.exists(), "what this machine knows may have changed"
    assert "nothing to do" in capsys.readouterr().err


def test_grids_are_the_runs_own_pixels(made: Made) -> None:
    picture = np.asarray(Image.open(made.root / "report" / "grids" / "student-4.png"))
    images = np.load(made.root / "samples" / "student-4" / "images-00000.npy")
    seventh = images[6::10][2, :, :, 0]  # class 6, third column
    assert np.array_equal(picture[6 * 17 : 6 * 17 + 16 : 2, 2 * 17 : 2 * 17 + 16 : 2, 0], seventh)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_a_missing_run_is_refused_and_left_out_of_a_partial_report(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = report_artifacts.build(runs)
    (runs / "evaluations" / "student-4").rename(runs / "away")
    with pytest.raises(InputError, match=r"evaluations/student-4 does not exist.*--partial"):
        make(runs, params)
    body, page = make(runs, params, partial=True)
    assert body["left_out"] == ["evaluations/student-4"]
    assert "student-4" not in [run["name"] for run in body["runs"]]
    assert "A partial report" in page
    assert "left out: evaluations/student-4" in capsys.readouterr().err


def test_artefacts_that_do_not_belong_together_are_refused(runs: Path) -> None:
    params = report_artifacts.build(runs)
    other = runs / "other"
    report_artifacts.build(other, runs={"student-4": (5, 1.0, 2.0, 0.9, 0.9)})
    (runs / "samples" / "student-4").rename(runs / "away")
    (other / "samples" / "student-4").rename(runs / "samples" / "student-4")
    with pytest.raises(
        InputError, match=r"evaluations/student-4 was made from a different samples .*pipestill evaluate"
    ):
        make(runs, params)


def test_a_converted_model_is_among_those_of_the_report(runs: Path) -> None:
    made, _ = make(runs, report_artifacts.build(runs, converted=True))
    assert {run["model"] for run in made["runs"]} == {"teacher", "student-10", "student-4"}
    assert made["left_out"] == []


def test_what_comes_from_a_model_that_is_left_out_is_left_out_too(runs: Path) -> None:
    params = report_artifacts.build(runs)
    (runs / "models" / "teacher").rename(runs / "away")
    body, _ = make(runs, params, partial=True)
    assert body["runs"] == []
    assert {"models/teacher", "models/student-4", "samples/student-4"} <= set(body["left_out"])


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"data.resolution": 16}, "dataset"),
        ({"reference.classifier.seed": 1}, "reference"),
        ({"teachers.teacher.training.seed": 1}, "models/teacher"),
        ({"distillation.students.student-4.seed": 7}, "models/student-4"),
        ({"sampling.runs.student-4.guidance": 2.0}, "samples/student-4"),
        ({"evaluation.batch": 7}, "evaluations/"),
    ],
)
def test_artefacts_of_the_same_name_but_of_other_parameters_are_refused(
    made: Made, tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    ((name, value),) = changes.items()
    body = node = made.params.plain()
    *parents, last = name.split(".")
    for parent in parents:
        node = node[parent]
    node[last] = value
    with pytest.raises(InputError, match=f"{what}.* was made with different parameters than the current ones"):
        report(check(body), places=report_artifacts.places(made.root), output=tmp_path / "report")


def test_artefacts_of_an_older_version_of_their_stage_are_refused(runs: Path) -> None:
    """Of the version before, and of 2, whose teachers had lost their raw weights."""
    params = report_artifacts.build(runs)
    path = runs / "models" / "teacher" / "manifest.json"
    manifest = artifacts.Manifest.from_json(path.read_text())
    for older in (2, manifest.version - 1):
        path.write_text(dataclasses.replace(manifest, version=older).to_json())
        said = rf"models/teacher was made by version {older} of pipestill train, it is {manifest.version} now"
        with pytest.raises(InputError, match=f"{said}: run pipestill train again"):
            make(runs, params)
    body, _ = make(runs, params, partial=True)
    assert "models/teacher" in body["left_out"]


def test_runs_of_other_parameters_are_left_alone(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
    params = report_artifacts.params({"student-4": None}, seeds=5)
    artifact = report(params, places=report_artifacts.places(made.root), output=tmp_path / "report")
    body = json.loads((artifact.path / "report.json").read_text())
    assert [run["name"] for run in body["runs"]] == ["student-4"]
    assert body["left_out"] == []


def test_the_command_line_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--dataset", "data"]) == 2
    message = capsys.readouterr().err
    assert "--reference, --models, --samples, --evaluations, --output missing" in message
    assert message.count("\n") == 1


# --- the page -----------------------------------------------------------------------------------------------------


def test_the_page_is_valid_and_stands_alone(made: Made) -> None:
    text = made.text
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r'"data:[^"]*"', "", text)), "no address outside the page"
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    identifiers = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(identifiers) == len(set(identifiers))
    targets = {attributes["href"] for attributes in page.all("a")}
    assert targets <= {f"#{identifier}" for identifier in identifiers}
    assert all(attributes.get("alt") for attributes in page.all("img"))
    assert all(attributes.get("aria-label") or attributes.get("aria-hidden") for attributes in page.all("svg"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert len(text) < 600_000


def test_the_page_escapes_what_users_wrote(made: Made) -> None:
    assert "Digits &amp; &lt;bars&gt;" in made.text
    assert "<bars>" not in made.text


def test_the_table_shows_figures_floors_marks_and_dashes(made: Made) -> None:
    table = [[" ".join(cell.split()) for cell in row] for row in Page(made.text).rows]
    rows = {row[0].split()[0]: row for row in table if row and row[0]}
    head = next(row for row in table if "Evaluations" in row)
    column = head.index
    ten, floor = rows["student-10"], rows["Real"]
    assert ten[column("Evaluations")] == "10"
    assert ten[column("Distance")] == "1.61 (lowest at its number of evaluations or fewer)[1.50, 1.74]"
    assert ten[column("Excess")] == "+0.69floor 0.92"
    assert floor[column("Distance")] == "0.92[0.81, 1.04]"
    assert floor[column("Evaluations")] == "–"
    assert "has the model memorised?" in rows["teacher-euler-4"][column("Nearest train")]
    assert rows["teacher-heun-9"][column("Distance")].startswith("2.44 (its interval reaches")


def test_series_keep_samplers_apart_and_students_together(made: Made) -> None:
    body = made.body
    named = results.series_of(body["runs"])
    assert {label for label, _ in named.values()} == {
        "students",
        "teacher, Heun",
        "teacher, DPM-Solver++(2M)",
        "teacher, Euler",
        "teacher, renoising",
    }
    chart = results.distance_chart(body, "classifier")
    assert chart is not None
    assert [rule.y for rule in chart.rules] == [0.92]
    heun = next(series for series in chart.series if series.name == "teacher, Heun")
    assert [(point.x, point.y) for point in heun.points] == [(9, 2.44), (79, 1.52)]
    assert chart.log_x
    assert chart.log_y


def test_bars_are_as_long_as_distances_say(made: Made) -> None:
    body = made.body
    tile = next(tile for tile in results.tiles(body) if tile.run == "student-4")
    duel = tile.duels[0]
    assert [bar.text for bar in duel.bars] == ["2.36", "6.71", "1.52"]
    assert duel.bars[0].share == pytest.approx(100 * 2.36 / 6.71)
    assert duel.floor == pytest.approx(100 * 0.92 / 6.71)
    assert duel.ratio == "0.35×"


def test_a_project_without_runs_has_a_page(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
    places, params = report_artifacts.places(made.root), report_artifacts.params({})
    artifact = report(params, places=places, output=tmp_path / "report")
    Page((artifact.path / "index.html").read_text())
    body = json.loads((artifact.path / "report.json").read_text())
    assert body["verdict"] == "No run has been measured yet."
    assert [model["name"] for model in body["models"]] == ["teacher", "student-10", "student-4"]


# --- the table for terminals --------------------------------------------------------------------------------------


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    folder = tmp_path / "metrics"
    folder.mkdir()
    bodies: dict[str, dict[str, Any]] = {
        "floor": {"fd_classifier": 0.92, "class_accuracy": 0.98, "evaluations": 0},
        "student-4": {"fd_classifier": 2.361, "class_accuracy": 0.984, "evaluations": 4},
        "teacher-heun-79": {"fd_classifier": 1.52, "class_accuracy": 0.99, "evaluations": 79},
    }
    for name, body in bodies.items():
        (folder / f"{name}.json").write_text(json.dumps(body))
    return folder


def test_the_small_table(metrics: Path) -> None:
    assert results_table(metrics).splitlines() == [
        "                   evaluations  fd_classifier  class_accuracy",
        "─────────────────────────────────────────────────────────────",
        "real against real            –          0.920           0.980",
        "teacher-heun-79             79          1.520           0.990",
        "student-4                    4          2.361           0.984",
    ]


def test_the_small_table_names_class_mixes_where_one_is_not_balanced(metrics: Path) -> None:
    mixes: dict[str, tuple[list[str], list[str]]] = {
        "floor": (["balanced"], []),
        "student-4": (["listed"], ["plan=listed samples chosen classes"]),
        "teacher-heun-79": (["balanced"], []),
    }
    for name in mixes:
        file = metrics / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"mix": ["balanced"]}))
    assert "class mix" not in results_table(metrics)
    for name, (mix, notes) in mixes.items():
        file = metrics / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"mix": mix, "notes": notes}))
    head, _, *rows = results_table(metrics).splitlines()
    assert head.endswith("class mix")
    assert [re.split("  +", row)[-1] for row in rows] == [
        "balanced",
        "balanced",
        "listed; plan=listed samples chosen classes",
    ]


def test_an_exported_card_names_class_mixes_where_one_is_not_balanced() -> None:
    body = {"fd_classifier": 2.0, "floor_fd_classifier": 1.0, "evaluations": 4, "guidance": 1.0, "mix": ["balanced"]}
    plain = card._table({"a": body | {"notes": []}})
    assert plain == [
        ["run", "evaluations", "guidance", "distance, classifier features", "floor", "class accuracy", "diversity"],
        ["a", "4", "1.00", "2.00", "1.00", "–", "–"],
    ]
    noted = body | {"mix": ["data"], "notes": ["of classes without test images: a|b"]}
    head, *rows = card._table({"a": body, "b": noted, "c": {**body, "mix": []}})
    assert head[-1] == "class mix"
    assert [row[-1] for row in rows] == ["balanced", "data; of classes without test images: a\\|b", "–"]


def test_the_small_table_needs_no_torch(metrics: Path) -> None:
    script = (
        "import sys; from pipestill.cli import main; code = main(['report', '--print-table', sys.argv[1]]); "
        "heavy = {'torch', 'numpy', 'PIL', 'jinja2', 'lmdb', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(metrics)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == results_table(metrics)


def test_bad_metrics_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no metrics"):
        results_table(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match=r"broken\.json cannot be read"):
        results_table(tmp_path)


@pytest.mark.parametrize(
    ("denoiser", "native", "says"),
    [
        ({"kind": "edm", "sigma_max": 80.0, "sigma_min": 0.002}, None, "sigma 80 to 0.002"),
        (
            {"kind": "edm", "sigma_max": 80.0, "sigma_min": 0.002},
            {"sigma_max": 8.0, "sigma_min": 0.05},
            "sigma 8 to 0.05",
        ),
        (
            {"kind": "vp", "prediction": "epsilon", "schedule": "scaled_linear", "steps": 1000}
            | {"zero_terminal_snr": False},
            None,
            "DDPM's eps, scaled-linear schedule of 1,000 steps",
        ),
        (
            {"kind": "vp", "prediction": "v_prediction", "schedule": "squaredcos_cap_v2", "steps": 500}
            | {"zero_terminal_snr": True},
            None,
            "DDPM's v, cosine schedule of 500 steps to pure noise",
        ),
        ({"kind": "flow", "sigma_min": 0.002}, None, "a flow's velocity"),
        (
            {"kind": "flow", "sigma_min": 0.002},
            {"spacing": "trailing", "sigma_max": None, "sigma_min": None},
            "trailing steps of its teacher's noise",
        ),
    ],
)
def test_the_noise_of_every_kind_of_model_is_said(denoiser: dict[str, Any], native: Any, says: str) -> None:
    assert figures.noise_of({"denoiser": denoiser, "native": native}) == says


def test_a_run_from_pure_noise_is_shown_with_its_levels() -> None:
    cell = results._sigma({"sigma_max": None, "sigma_min": 0.5})
    assert (cell.text, cell.value) == ("∞ to 0.5", 1e9)
    assert results._sigma({"sigma_max": 157.4, "sigma_min": 0.01}).text == "157 to 0.01"
    assert results._sigma({}).value is None
