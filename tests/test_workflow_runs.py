"""The whole pipeline in miniature, three ways: equal digests, nothing redone, nothing stale signed."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
from pathlib import Path

import pytest

from workflow_project import Project, dvc_stages, make_project

MINIATURE = "experiment=miniature"
RATE = "distillation.students.student-10.generator_lr=0.01"
AFTER_STUDENT = {"distill@student-10", "sample@student-10", "evaluate@student-10", "report"}

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The miniature, run by Snakemake and committed with its lock and metrics; the tests leave it as it is."""
    project = make_project(tmp_path_factory.mktemp("snakemake") / "project", MINIATURE)
    project.snakemake()
    project.commit("results")
    return project


def plotted(text: str) -> dict[str, list[dict[str, str]]]:
    """The rows of each of DVC's plots, from its JSON; none may have failed to load."""
    body = json.loads(text)
    assert not body.get("errors")
    return {name: plots[0]["content"]["data"]["values"] for name, plots in body["data"].items()}


def test_after_snakemake_dvc_has_recorded_everything(finished: Project) -> None:
    assert finished.unfinished_for_dvc() == set()
    said = finished.dvc("repro")
    assert "Running stage" not in said
    assert "up to date" in said
    assert finished.planned() == {}
    assert finished.git("status", "--porcelain") == ""


def test_metrics_of_every_run_and_the_floor(finished: Project) -> None:
    shown = json.loads(finished.dvc("metrics", "show", "--json"))[""]["data"]
    assert set(shown) == {f"metrics/{name}.json" for name in ("floor", "teacher-2m-4", "student-10", "student-4")}
    keys = {"fd_classifier", "fd_efficientnet_lite0", "class_accuracy", "diversity", "evaluations", "images", "seeds"}
    for name, entry in shown.items():
        assert keys | {"guidance"} >= set(entry["data"]) >= keys, name


def test_plots_show_every_models_curves_and_every_runs_distance(finished: Project) -> None:
    shown = plotted(finished.dvc("plots", "show", "--json"))
    models = {"loss": ["teacher"], "fake_score_loss": ["student-10", "student-4"]}
    models["validation_distance"] = models["fake_score_loss"]
    names = [f"artifacts/report/plots/{curve}/{name}.csv" for curve, found in models.items() for name in found]
    assert shown.keys() == {"distance of each run", *names}
    for name in names:
        curve, model = Path(name).parts[-2:]
        with (finished.root / "artifacts/models" / model.removesuffix(".csv") / "curves.csv").open() as file:
            expected = [(row["step"], row[curve]) for row in csv.DictReader(file) if row[curve]]
        assert [(row["step"], row[curve]) for row in shown[name]] == expected
    for row in shown["distance of each run"]:
        metrics = json.loads((finished.root / "artifacts/evaluations" / row["run"] / "metrics.json").read_text())
        assert float(row["fd_efficientnet_lite0"]) == pytest.approx(metrics["fd_efficientnet_lite0"], rel=1e-5)
    assert len(shown["distance of each run"]) == 3


def test_dvc_repro_makes_the_same_and_leaves_nothing_to_do(finished: Project, tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", MINIATURE)
    project.pipestill("repro")
    assert project.payloads() == finished.payloads()
    project.pipestill("sync")
    assert project.planned() == {}
    said = project.by_hand()
    assert said.count("nothing to do") == len(dvc_stages(project.root))
    assert project.planned() == {}
    project.pipestill("config", MINIATURE, RATE)
    assert project.planned().keys() == AFTER_STUDENT, "without sync Snakemake has no record of parameters"


def test_by_hand_makes_the_same_and_leaves_nothing_to_do(finished: Project, tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", MINIATURE)
    project.by_hand()
    assert project.payloads() == finished.payloads()
    project.pipestill("record")
    assert project.unfinished_for_dvc() == set()
    project.pipestill("sync")
    assert project.planned() == {}


def test_a_clone_plans_everything_and_after_pull_and_sync_nothing(finished: Project, tmp_path: Path) -> None:
    origin = finished.copy(tmp_path / "origin")
    origin.dvc("remote", "add", "--default", "store", str(tmp_path / "store"))
    origin.commit("where artefacts are kept")
    origin.dvc("push", "--quiet")
    origin.git("clone", "--quiet", str(origin.root), str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone")
    assert clone.planned().keys() == dvc_stages(clone.root).keys()
    clone.dvc("pull", "--quiet")
    assert clone.payloads() == origin.payloads()
    clone.pipestill("sync")
    assert clone.planned() == {}
    assert clone.unfinished_for_dvc() == set()


def test_a_students_rate_reruns_that_student_and_what_follows(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "project")
    before = project.payloads()
    old = json.loads((project.root / "metrics" / "student-10.json").read_text())
    project.pipestill("config", MINIATURE, RATE)
    assert project.planned().keys() == AFTER_STUDENT
    project.git("checkout", "--", "params.yaml")
    assert project.planned() == {}

    said = project.dvc("exp", "run", "--set-param", RATE)
    assert set(re.findall(r"Running stage '([^']+)'", said)) == AFTER_STUDENT
    after = project.payloads()
    assert {path for path in after if after[path] != before[path]} == {
        *("artifacts/models/student-10", "artifacts/samples/student-10"),
        *("artifacts/evaluations/student-10", "artifacts/report"),
    }
    project.pipestill("sync")
    assert project.planned() == {}

    new = json.loads((project.root / "metrics" / "student-10.json").read_text())
    changes = json.loads(project.dvc("metrics", "diff", "--json"))
    assert set(changes) == {"metrics/student-10.json"}
    distance = changes["metrics/student-10.json"]["fd_efficientnet_lite0"]
    assert (distance["old"], distance["new"]) == (old["fd_efficientnet_lite0"], new["fd_efficientnet_lite0"])
    assert distance["old"] != distance["new"]
    rows = plotted(project.dvc("plots", "diff", "--json"))["artifacts/report/plots/validation_distance/student-10.csv"]
    assert {row["rev"] for row in rows} == {"HEAD", "workspace"}


def test_what_is_stale_is_neither_recorded_nor_accepted(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "project")
    project.pipestill("config", MINIATURE, "training.iterations=10")
    project.by_hand("train@teacher")
    said = project.pipestill("record")
    assert re.search(r"^recorded 1: train@teacher$", said, re.MULTILINE)
    assert "not recorded: distill@student-4: artifacts/models/student-4 was made from another model as its" in said
    stale = set(dvc_stages(project.root)) - {"example@digits", "dataset", "reference", "train@teacher"}
    direct = {address for address in stale if not address.startswith("evaluate")}
    assert project.unfinished_for_dvc() >= direct - {"sample@student-10", "sample@student-4"}
    said = project.pipestill("sync")
    assert "left to run: evaluate@student-4: what it comes from has to run" in said
    assert project.planned().keys() == stale


def test_what_is_damaged_is_neither_recorded_nor_accepted(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "project")
    store = project.root / "artifacts/dataset/images.lmdb"
    content = bytearray(store.read_bytes())
    content[len(content) // 2] ^= 1
    store.unlink()  # DVC's copies are links
    store.write_bytes(content)
    (project.root / "artifacts/report/index.html").unlink()
    said = project.pipestill("record")
    assert re.search(r"not recorded: dataset: .*images\.lmdb differs from its manifest", said)
    assert re.search(r"not recorded: report: .*index\.html is missing", said)
    said = project.pipestill("sync")
    assert re.search(r"left to run: dataset: .*images\.lmdb differs from its manifest", said)
    assert re.search(r"left to run: report: .*index\.html is missing", said)


def test_sync_accepts_what_a_killed_snakemake_left_marked_as_incomplete(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "project")
    marks = project.root / ".snakemake" / "incomplete"
    marks.mkdir(exist_ok=True)
    (marks / base64.b64encode(b"artifacts/dataset/manifest.json").decode()).touch()
    project.pipestill("sync")
    assert project.planned() == {}


def test_metrics_that_are_not_the_artefacts_are_not_recorded(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "project")
    path = project.root / "metrics" / "student-4.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fd_classifier": 0.0}))
    said = project.pipestill("record")
    assert "not recorded: evaluate@student-4: metrics/student-4.json does not hold the metrics of" in said
    assert project.unfinished_for_dvc() == {"evaluate@student-4"}
    path.unlink()
    assert "metrics/student-4.json is missing" in project.pipestill("record")


def test_artefacts_of_other_parameters_are_not_signed_with_the_report(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "project")
    shutil.copytree(project.root / "artifacts/samples/student-4", project.root / "artifacts/samples/earlier")
    said = project.pipestill("record")
    assert "not recorded: report: artifacts/samples/earlier belongs to no stage" in said
    assert "artifacts/samples/earlier" in project.pipestill("doctor", "--quick")


def test_what_finished_before_a_failure_is_recorded(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "project")
    project.pipestill("config", MINIATURE, "sampling.runs.student-4.seeds=[7]")
    project.edit("dvc.yaml", "pipestill report --dataset", "pipestill reprot --dataset")
    said = project.snakemake(code=1)
    assert "recorded 2: sample@student-4 evaluate@student-4" in said
    assert any(line.startswith("report ended with 2: pipestill: ") for line in said.rstrip().splitlines()[-6:])
    assert said.count("there is no command 'reprot'") == 1
    assert "there is no command 'reprot'" in (project.root / "runs/logs/report/all.log").read_text()
    assert "evaluate student-4 ended" not in said
    assert project.unfinished_for_dvc() == {"report"}


def test_recording_can_be_switched_off(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "project")
    overrides = ["sampling.runs.student-4.seeds=[8]", "operation.record=false"]
    project.pipestill("config", MINIATURE, *overrides)
    said = project.snakemake("artifacts/samples/student-4/manifest.json")
    assert "recorded" not in said
    assert "sample@student-4" in project.unfinished_for_dvc()


def test_trace_leads_from_a_figure_to_the_images(finished: Project) -> None:
    lines = finished.pipestill("trace", "--verify", "metrics/student-4.json").splitlines()
    payloads = finished.payloads()
    behind = [
        "evaluations/student-4",
        "samples/student-4",
        "models/student-4",
        "models/teacher",
        "reference",
        "dataset",
    ]
    for place in [*(f"artifacts/{name}" for name in behind), "data/digits"]:
        assert any(payloads[place] in line and f" in {place}, " in line and "verified" in line for line in lines), place
    assert not any("student-10" in line for line in lines)
    count = sum(" in artifacts/" in line or " in data/" in line for line in lines if "(above)" not in line)
    assert lines[-1] == f"every byte of {count} artefacts is as its manifest says"


def test_trace_says_what_is_gone_changed_or_unknown(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "project")
    shutil.rmtree(project.root / "artifacts/models/teacher")
    said = project.pipestill("trace", "artifacts/samples/student-4/grid.png")
    teacher = finished.payloads()["artifacts/models/teacher"]
    assert f"teacher: model {teacher} (not here: pull it" in said
    said = project.pipestill("trace", "--verify", "artifacts/samples/student-4")
    assert said.rstrip().endswith("; not here, so not verified: init")
    curves = project.root / "artifacts/models/student-4/curves.csv"
    curves.write_text(curves.read_text().replace("0", "1"))
    said = project.pipestill("trace", "--verify", "artifacts/models/student-4", code=2)
    assert "curves.csv differs from its manifest" in said
    other = project.root / "metrics" / "other.json"
    other.write_text('{"fd_classifier": 1.0}')
    assert project.pipestill("trace", "metrics/other.json", code=2).count("\n") == 1
    assert "does not exist" in project.pipestill("trace", "metrics/none.json", code=2)


def test_an_export_shows_its_own_figures_alone(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "project")
    words = ["export", "--model", "artifacts/models/student-4", "--output", "out", "--licence", "CC-BY-4.0"]
    said = project.pipestill(*words, "--metrics", "metrics/student-10.json", code=2)
    assert "artifacts/samples/student-10 was not sampled from this model" in said
    project.pipestill(*words, "--metrics", "metrics/student-4.json", "--samples", "artifacts/samples/student-4")
    text = (project.root / "out/README.md").read_text()
    figures = json.loads((project.root / "metrics/student-4.json").read_text())
    row = next(line for line in text.splitlines() if line.startswith("| student-4 | 2 | 1.00 |"))
    assert figures["class_accuracy"] in [float(cell) for cell in row.split("|")[2:-1]]
    payloads = finished.payloads()
    for place in ("artifacts/models/student-4", "artifacts/models/teacher", "artifacts/dataset", "data/digits"):
        assert payloads[place] in text


def test_doctor_names_what_stands_and_what_does_not(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "project")
    said = project.pipestill("doctor")
    assert re.search(r"^ok    \d+ artefacts stand and verify$", said, re.MULTILINE)
    assert "ok    DVC has recorded what stands" in said
    assert {line[:6] for line in said.splitlines()} <= {"ok    ", "warn  "}

    project.edit("params.yaml", "path: data/digits/images", "path: photos")
    shutil.rmtree(project.root / "artifacts/dataset")
    assert "warn  photos, which dataset reads, does not exist" in project.pipestill("doctor", "--quick")
    project.git("checkout", "params.yaml")
    shutil.copytree(finished.root / "artifacts/dataset", project.root / "artifacts/dataset")

    network = next((project.root / "artifacts/models/student-4/unet").glob("*.safetensors"))
    content = bytearray(network.read_bytes())
    content[-1] ^= 1
    network.write_bytes(content)
    project.edit("params.yaml", "title: Miniature", "title: Another")
    said = project.pipestill("doctor", code=3)
    assert re.search(r"^fail  distill@student-4: .*safetensors differs from its manifest", said, re.MULTILINE)
    assert 'warn  report: artifacts/report was made with other parameters (title is "Another" now' in said
    assert "with edits by hand" in said
