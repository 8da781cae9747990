"""Distillation as a command: killed and resumed over ranks, its artefact, and what it refuses."""

from __future__ import annotations

import csv
import json
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from commands import SLOWLY, Command, finish, here, kill_and_resume, payload, write_params
from pipestill import cli
from tiny_models import make_model

UPDATES = 12
DIGITS = tuple("0123456789")
STUDENT = {
    "teacher": "teacher",
    "init": "teacher",
    "steps": 3,
    "iterations": UPDATES,
    "update_ratio": 2,
    "batch": 16,
    "rollout": "pool",  # the one that has a state
    "pool": {"updates": 5, "uses": 2},
    "validation": {"every": 4, "images": 20, "micro_batch": 10, "extractor": "classifier"},
    "gan": {"generator_weight": 0.01, "discriminator_weight": 0.1, "r1": 0.1},
}
NAMES = ("student-10", "student-4")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("teacher") / "teacher", classes=DIGITS, sigma_data=0.583).path


def arguments(
    folder: Path, digits: Path, reference: Path, teacher: Path, output: str = "m", **student: object
) -> list[object]:
    params = write_params(
        folder / f"{output}.yaml",
        **{
            "distillation.students": dict.fromkeys(NAMES, STUDENT | student),
            "operation": {"save_every": 0.001, "log_every": 1},
        },
    )
    places = ["--dataset", digits, "--reference", reference, "--teacher", teacher]
    return ["distill", "--name", "student-4", *places, "--output", folder / output, "--params", params]


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, digits: Path, digits_reference: Path, teacher: Path
) -> dict[int, Path]:
    """Students that nobody disturbed, by number of ranks."""
    folder = tmp_path_factory.mktemp("whole")
    for ranks in (1, 2):
        command = arguments(folder, digits, digits_reference, teacher, f"m{ranks}")
        finish(*command, "--ranks", ranks, runs=folder / f"runs{ranks}")
    return {ranks: folder / f"m{ranks}" for ranks in (1, 2)}


@pytest.mark.parametrize(("ranks", "kills"), [(2, 1)])
def test_killed_and_resumed_gives_the_same_student(
    tmp_path: Path,
    digits: Path,
    digits_reference: Path,
    teacher: Path,
    uninterrupted: dict[int, Path],
    ranks: int,
    kills: int,
) -> None:
    command = [*arguments(tmp_path, digits, digits_reference, teacher), "--ranks", ranks]
    chance = random.Random(ranks)
    digest = kill_and_resume(command, tmp_path, kills=kills, updates=UPDATES, chance=chance, environment=SLOWLY)
    assert digest == payload(uninterrupted[ranks])


def test_previews_change_no_weight(
    tmp_path: Path, digits: Path, digits_reference: Path, teacher: Path, uninterrupted: dict[int, Path]
) -> None:
    command = arguments(tmp_path, digits, digits_reference, teacher)
    shown = ["operation.preview.share=1", "operation.preview.every=5", "operation.preview.each=1"]
    here(*command, *shown, runs=tmp_path / "runs")
    made = {path.parent.name for path in (tmp_path / "runs").rglob("epoch_*.png")}
    assert made == {"step-00000005", "step-00000010"}
    assert payload(tmp_path / "m") == payload(uninterrupted[1])


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_often_and_resumed_gives_the_same_student(
    tmp_path: Path, digits: Path, digits_reference: Path, teacher: Path, uninterrupted: dict[int, Path], ranks: int
) -> None:
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        command = [*arguments(folder, digits, digits_reference, teacher), "--ranks", ranks]
        digest = kill_and_resume(command, folder, kills=10, updates=UPDATES, chance=random.Random())
        assert digest == payload(uninterrupted[ranks])


def test_a_student_is_watched_from_its_states_to_its_model(
    tmp_path: Path, digits: Path, digits_reference: Path, teacher: Path
) -> None:
    """`evaluate --watch` with the student's own sampler; the last row is the published model, its best weights."""
    command, runs = arguments(tmp_path, digits, digits_reference, teacher), tmp_path / "runs"
    entry = {"model": "student-4", "sigmas": "models/student-4", "images": 20, "micro_batch": 10}
    changes = {"sampling.runs": {"own": entry}, "reference.floor.counts": [20], "tune": {}}
    params = write_params(tmp_path / "watch.yaml", **changes)
    trained = Command(*command, runs=runs)
    assert trained.wait_until(lambda: any(runs.glob("distill/*/saved.txt"))), trained.output
    trained.process.send_signal(signal.SIGSTOP)  # its states stay as they are
    places = ["--watch", tmp_path / "m", "--reference", digits_reference, "--output", tmp_path / "watched"]
    watched = Command("evaluate", "--name", "own", *places, "--params", params, "--by", "fd_classifier", runs=runs)
    table = tmp_path / "watched" / "checkpoints.csv"
    assert watched.wait_until(lambda: table.exists() and ",evaluated," in table.read_text()), watched.output
    trained.process.send_signal(signal.SIGCONT)
    assert trained.wait() == 0, trained.output
    assert watched.wait() == 0, watched.output
    with table.open(newline="") as file:
        rows = {row["checkpoint"]: row for row in csv.DictReader(file)}
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert int(rows["published"]["step"]) == manifest["summary"]["best_step"]
    best = min((row for row in rows.values() if row["fd_classifier"]), key=lambda row: float(row["fd_classifier"]))
    kept = json.loads((tmp_path / "watched" / "best" / "manifest.json").read_text())
    assert kept["parameters"]["checkpoint"] == best["checkpoint"]
    assert json.loads((tmp_path / "watched" / "best" / "model.json").read_text())["native"]["steps"] == 3


def test_the_student_carries_its_schedule_and_its_best_weights(uninterrupted: dict[int, Path]) -> None:
    folder = uninterrupted[1]
    card = json.loads((folder / "model.json").read_text())
    assert card["role"] == "student"
    assert card["denoiser"]["sigma_data"] == 0.583  # the teacher's
    levels = {"spacing": "karras", "sigma_max": 8.0, "sigma_min": 0.05, "rho": 7.0}
    assert card["native"] == {"steps": 3, "transition": "euler"} | levels
    rows = [line.split(",") for line in (folder / "curves.csv").read_text().splitlines()]
    column = rows[0].index("validation_distance")
    distances = {int(row[0]): float(row[column]) for row in rows[1:] if row[column]}
    assert list(distances) == [4, 8, 12]
    summary = json.loads((folder / "manifest.json").read_text())["summary"]
    assert summary["best_step"] == min(distances, key=lambda step: distances[step])
    assert summary["validation_distance"] == pytest.approx(min(distances.values()), rel=1e-5)


def test_diffusers_loads_the_student(uninterrupted: dict[int, Path]) -> None:
    from diffusers import UNet2DModel

    from pipestill.networks.model import load_model

    theirs = UNet2DModel.from_pretrained(uninterrupted[1], subfolder="unet")
    ours = load_model(uninterrupted[1]).unet
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in theirs.state_dict().items())


def test_a_student_starts_from_another(
    tmp_path: Path, digits: Path, digits_reference: Path, teacher: Path, uninterrupted: dict[int, Path]
) -> None:
    """With a learning rate of next to nothing the student stays where --init put it."""
    still = {
        "generator_lr": 1e-12,
        "iterations": 4,
        "validation": STUDENT["validation"],
        "optimizer": {"weight_decay": 0},
    }
    command = arguments(tmp_path, digits, digits_reference, teacher, **still)
    here(*command, "--init", uninterrupted[1], runs=tmp_path / "runs")

    from pipestill.networks.model import load_model

    began = load_model(uninterrupted[1]).unet.state_dict()
    ended = load_model(tmp_path / "m").unet.state_dict()
    for name, tensor in began.items():
        torch.testing.assert_close(ended[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "student", "message"),
    [
        ({"classes": ("a", "b")}, {}, "has 2 classes, "),
        ({"channels": 3}, {}, "has channels 3, "),
        ({"resolution": 16}, {}, "has resolution 16, "),
        ({"unconditional": False}, {}, "has no unconditional branch"),
        ({}, {"dm": {"sigma_min": 79.9, "sigma_max": 80}}, "no noise level lies between"),
        ({}, {"gan": {"generator_weight": 1, "discriminator_weight": 0}}, "needs a trained discriminator"),
        ({}, {"sigma_min": 9.0, "sigma_max": 8.0}, "sigma_min"),
        ({}, {"batch": 0}, "distillation.students.student-4.batch=0"),
    ],
)
def test_what_does_not_fit_is_one_line_and_exit_2(
    tmp_path: Path,
    digits: Path,
    digits_reference: Path,
    model: dict[str, object],
    student: dict[str, object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
    path = make_model(tmp_path / "teacher", **({"classes": DIGITS} | model)).path  # type: ignore[arg-type]
    code = cli.main([str(part) for part in arguments(tmp_path, digits, digits_reference, path, **student)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pipestill distill:")]
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "m").exists()


def test_a_dataset_is_no_teacher(
    tmp_path: Path, digits: Path, digits_reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main([str(part) for part in arguments(tmp_path, digits, digits_reference, digits)])
    assert code == 2
    assert "is a dataset artefact, a model was expected" in capsys.readouterr().err


def test_cards_differ_only_in_what_distillation_changes(uninterrupted: dict[int, Path], teacher: Path) -> None:
    from pipestill.networks.model import read_card

    card, source = read_card(uninterrupted[1])[1], read_card(teacher)[1]
    assert replace(card, role="teacher", native=None) == source
