"""Which runs the small table shows, and who says so: the table, scripts/results.py, doctor."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest

from commands import write_params
from pipestill import artifacts, cli, config, configure
from pipestill.artifacts import Artifact
from pipestill.commands import doctor
from pipestill.config import Section
from pipestill.errors import InputError
from pipestill.evaluation.headline import file_of
from pipestill.reporting.current import Current
from pipestill.reporting.table import results_table, strays, table
from pipestill.versions import version_of
from pipestill.work import run_folder, write_atomic
from report_artifacts import publish, write_json

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import results

NAMED = ("floor", "student-4", "teacher-heun-79")
OTHERS = ("earlier-4", "other run")
STAGES = {"model": "train", "samples": "sample", "evaluation": "evaluate"}  # by kind, where it has another name
METRICS = {
    "floor": {"fd_classifier": 0.9151234, "evaluations": 0, "guidance": None, "images": 500},
    "student-4": {"fd_classifier": 2.25, "evaluations": 4, "guidance": 1.0, "floor_fd_classifier": 0.9151234},
    "teacher-heun-79": {"fd_classifier": 1.5, "evaluations": 79, "guidance": 1.0, "intervals": {}},
}


def make_artefacts(root: Path) -> None:
    """What the parameters ask for, as far as two runs come from it, with manifests as the stages write them."""
    params, place = config.load(root / "params.yaml"), root / "artifacts"

    def make(name: str, kind: str, section: Section, *sources: Artifact, **files: object) -> Artifact:
        def fill(folder: Path) -> None:
            for file, body in (files or {"payload": name}).items():
                write_json(folder / f"{file}.json", body)

        inputs = {f"{number}-{source.path.name}": source.as_input for number, source in enumerate(sources)}
        return publish(place / name, kind, STAGES.get(kind, kind), fill, parameters=section.plain(), inputs=inputs)

    dataset = make("dataset", "dataset", params.data)
    reference = make("reference", "reference", params.reference, dataset, floor={"500": METRICS["floor"]})
    teacher = make("models/teacher", "model", params.teachers["teacher"], dataset)
    students = params.distillation.students
    student = make("models/student-4", "model", students["student-4"], dataset, reference, teacher, teacher)
    for name, model in (("teacher-heun-79", teacher), ("student-4", student)):
        samples = make(f"samples/{name}", "samples", params.sampling.runs[name], model)
        make(f"evaluations/{name}", "evaluation", params.evaluation, samples, reference, metrics=METRICS[name])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with two of its runs and the floor, whole, and with metrics that an earlier experiment left."""
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
    write_params(tmp_path / "params.yaml")
    make_artefacts(tmp_path)
    (tmp_path / "metrics").mkdir()
    for name in NAMED:
        (tmp_path / "metrics" / f"{name}.json").write_text(file_of([METRICS[name]]))
    for name in OTHERS:
        (tmp_path / "metrics" / f"{name}.json").write_text('{"fd_classifier": 1.0}')
    return tmp_path


def rewrite(folder: Path, **files: object) -> None:
    """Gives an artefact other files, with a manifest that says so."""
    for file, body in files.items():
        write_json(folder / f"{file}.json", body)
    manifest = artifacts.Manifest.from_json((folder / "manifest.json").read_text())
    described = artifacts.describe_files(folder)
    (folder / "manifest.json").write_text(dataclasses.replace(manifest, files=described).to_json())


def shown(folder: Path) -> list[str]:
    return table(folder).columns[0][1]


def notes(root: Path) -> dict[str, str]:
    found = table(root / "metrics")
    return {name: note for name, note in zip(found.columns[0][1], found.notes, strict=True) if note is not None}


def test_the_runs_of_the_params_beside_it_and_the_floor(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["real against real", "teacher-heun-79", "student-4"]
    said = "left out, params.yaml has no such run: earlier-4, other run\n"
    assert shown(project / "metrics") == wanted
    assert capsys.readouterr().err == said
    monkeypatch.chdir(project / "metrics")
    assert shown(Path()) == wanted
    monkeypatch.chdir(project)
    capsys.readouterr()
    assert cli.main(["report", "--print-table", "metrics"]) == 0
    printed = capsys.readouterr()
    assert printed.err == said
    assert "earlier" not in printed.out
    assert printed.out == results_table(Path("metrics"))
    assert results.results(project / "metrics").splitlines()[2:] == [
        "| real against real | – | 0.915 |",
        "| teacher-heun-79 | 79 | 1.500 |",
        "| student-4 | 4 | 2.250 |",
    ]


def test_times_are_those_that_this_machine_recorded(project: Path) -> None:
    assert "per image" not in results_table(project / "metrics")
    key = artifacts.read(project / "artifacts/samples/student-4", "samples").manifest.key
    write_atomic(run_folder("sample", key) / "record.json", json.dumps({"seconds_per_image": 0.0125}))
    assert results_table(project / "metrics").splitlines()[2:] == [
        "real against real            –          0.915          –",
        "teacher-heun-79             79          1.500          –",
        "student-4                    4          2.250    12.5 ms",
    ]
    assert "ms" not in results.results(project / "metrics"), "git does not track times"


def test_metrics_of_another_experiment_do_not_count(project: Path) -> None:
    write_params(project / "params.yaml", **{"data.path": "photos", "data.resolution": 32})
    why = "artifacts/dataset was made with different parameters"
    assert notes(project) == dict.fromkeys(("real against real", "student-4", "teacher-heun-79"), why)
    text = results_table(project / "metrics")
    assert "2.25" not in text
    assert f"student-4                    –  not current: {why}\n" in text
    with pytest.raises(InputError, match="different parameters"):
        results.results(project / "metrics")
    assert "| student-4 | 4 | 2.250 |" in results.results(project / "metrics", judge=False)


def test_a_teachers_other_parameters_leave_the_floor(project: Path) -> None:
    write_params(project / "params.yaml", **{"teachers.teacher.training.iterations": 7})
    why = "artifacts/models/teacher was made with different parameters"
    assert notes(project) == dict.fromkeys(("student-4", "teacher-heun-79"), why)
    assert shown(project / "metrics") == ["real against real", "student-4", "teacher-heun-79"]


def test_metrics_without_artefacts_or_of_older_ones_do_not_count(project: Path) -> None:
    rewrite(project / "artifacts/samples/student-4", payload="sampled again")
    (project / "artifacts/evaluations/teacher-heun-79/manifest.json").unlink()
    (project / "metrics/floor.json").write_text('{"fd_classifier": 0.5}')
    assert notes(project) == {
        "real against real": "the file does not hold the metrics of artifacts/reference: run pipestill reference again",
        "student-4": "artifacts/evaluations/student-4 was made from a different samples (0-student-4) than the "
        "current one",
        "teacher-heun-79": "artifacts/evaluations/teacher-heun-79 is not here",
    }


def test_a_floor_file_counts_with_every_count_or_not_at_all(project: Path) -> None:
    """metrics/floor.json holds the first floor, and all of them where there are several."""
    floors = [METRICS["floor"], METRICS["floor"] | {"fd_classifier": 0.5, "images": 700}]
    rewrite(project / "artifacts/reference", floor={str(floor["images"]): floor for floor in floors})
    file = project / "metrics/floor.json"
    stale = "the file does not hold the metrics of artifacts/reference: run pipestill reference again"
    for held, counts in (([floors[0]], False), (floors[::-1], False), ([floors[1]], False), (floors, True)):
        file.write_text(file_of(held))
        said = notes(project).get("real against real")
        assert (said is None) if counts else (said == stale), held
    file.write_text(file_of(floors).replace("0.5", "0.6"))
    assert notes(project)["real against real"] == stale


@pytest.mark.parametrize(
    ("folder", "stage", "rows"),
    [
        ("models/teacher", "train", ("student-4", "teacher-heun-79")),
        ("evaluations/student-4", "evaluate", ("student-4",)),
    ],
)
def test_what_another_version_of_a_stage_made_does_not_count(
    project: Path, folder: str, stage: str, rows: tuple[str, ...]
) -> None:
    now = version_of(stage)
    assert now is not None
    path = project / "artifacts" / folder / "manifest.json"
    manifest = artifacts.Manifest.from_json(path.read_text())
    path.write_text(dataclasses.replace(manifest, version=now - 1).to_json())
    why = f"artifacts/{folder} was made by version {now - 1} of pipestill {stage}, it is {now} now"
    assert {row: note for row, note in notes(project).items() if row in rows} == dict.fromkeys(rows, why)


def test_of_equal_payloads_one_that_stands_is_enough(project: Path) -> None:
    """A second student of the same bytes lies before the one that was sampled, and was made with other parameters."""
    students = config.load(project / "params.yaml").distillation.students
    first = next(iter(students))
    assert first != "student-4"
    twin = project / "artifacts/models" / first
    shutil.copytree(project / "artifacts/models/student-4", twin)
    manifest = artifacts.Manifest.from_json((twin / "manifest.json").read_text())
    assert dict(manifest.parameters) != students[first].plain()
    assert notes(project) == {}


def test_every_artefact_that_parameters_ask_for_is_judged() -> None:
    for experiment in ("imagenet64_dmd2_10step_finetune", "textures"):
        params = configure.compose([f"experiment={experiment}"])
        folders = set(Current(Path("nowhere"), params).nodes)
        assert {f"models/{name}" for name in params.models} <= folders
        assert {f"{kind}/{run}" for kind in ("samples", "evaluations") for run in params.sampling.runs} <= folders
        assert {f"tuned/{name}" for name in params.tune} | {f"fetched/{name}" for name in params.fetched} <= folders
        assert {"dataset", "reference"} <= folders


def test_nothing_is_said_where_nothing_is_left_out(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in OTHERS:
        (project / "metrics" / f"{name}.json").unlink()
    assert len(shown(project / "metrics")) == 3
    assert capsys.readouterr().err == ""


def test_without_params_beside_it_a_folder_shows_all(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "params.yaml").unlink()
    assert set(shown(project / "metrics")) == {"real against real", *NAMED[1:], *OTHERS}
    assert strays(project / "metrics") == []
    assert capsys.readouterr().err == ""


def test_a_folder_of_other_runs_alone_and_params_that_are_not_in_order(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMED:
        (project / "metrics" / f"{name}.json").unlink()
    with pytest.raises(InputError, match=r"has no metrics of the runs in params\.yaml"):
        table(project / "metrics")
    page = project / "README.md"
    page.write_text(f"{results.BEFORE}\nkept\n{results.AFTER}\n")
    monkeypatch.setattr(sys, "argv", ["results.py", "--metrics", str(project / "metrics"), "--readme", str(page)])
    with pytest.raises(SystemExit, match=r"results\.py: .* has no metrics of the runs"):
        results.main()
    assert "kept" in page.read_text()
    write_params(project / "params.yaml", **{"data.resolution": 1})
    with pytest.raises(InputError, match=r"params\.yaml: data\.resolution=1"):
        table(project / "metrics")


def test_doctor_says_how_to_remove_them(project: Path) -> None:
    assert list(doctor.metrics(project)) == [], "pipestill clean leaves what pipestill did not write"
    for name in OTHERS:
        earlier = METRICS["student-4"] | {"images": 500, "seeds": 1}
        (project / "metrics" / f"{name}.json").write_text(file_of([earlier]))
    (line,) = doctor.metrics(project)
    assert line.state == "warn"
    assert line.text.endswith("does not name: metrics/earlier-4.json, metrics/other run.json: pipestill clean")
    for name in OTHERS:
        (project / "metrics" / f"{name}.json").unlink()
    assert list(doctor.metrics(project)) == []
    (project / "params.yaml").write_text("nonsense: 1\n")
    assert list(doctor.metrics(project)) == []
