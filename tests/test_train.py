"""Training as a command: killed, stopped, resumed, over ranks; and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from commands import (
    SLOWLY,
    Command,
    alive,
    finish,
    here,
    kill_and_resume,
    payload,
    run,
    steps_logged,
    wait_for_end,
    write_params,
)
from pipestill import artifacts, cli
from pipestill.config import EdmParams, FlowParams, OperationParams, RunParams, TeacherParams, TrainedEdmParams
from pipestill.data.store import open_dataset
from pipestill.distributed import World
from pipestill.errors import InputError
from pipestill.networks import model
from pipestill.networks.model import load_model, read_card, save_model
from pipestill.sampling.store import open_samples
from pipestill.stages import train as stage
from pipestill.stages.sample import sample
from pipestill.training.ranks import seed_torch
from pipestill.training.teacher import TeacherTraining
from tiny_models import make_model

UPDATES = 24
TINY = {
    "teachers.teacher.network": {"channels": [8, 16], "layers": 1, "attention": [False, True], "norm_groups": 4},
    "teachers.teacher.training": {"iterations": UPDATES, "batch": 16, "validate_every": 10, "accumulation": 2},
    "operation": {"save_every": 0.001, "log_every": 1},
}


def arguments(folder: Path, digits: Path, output: str, **changes: object) -> list[object]:
    params = write_params(folder / f"{output}.yaml", **(TINY | changes))
    return ["train", "--name", "teacher", "--dataset", digits, "--output", folder / output, "--params", params]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> dict[int, str]:
    """Payload digests of trainings that nobody disturbed, by number of ranks."""
    folder = tmp_path_factory.mktemp("whole")
    digests = {}
    for ranks in (1, 2):
        finish(*arguments(folder, digits, f"m{ranks}"), "--ranks", ranks, runs=folder / f"runs{ranks}")
        digests[ranks] = payload(folder / f"m{ranks}")
    return digests


@pytest.mark.parametrize(("ranks", "kills"), [(1, 2), (2, 1)])
def test_killed_and_resumed_gives_the_same_weights(
    tmp_path: Path, digits: Path, uninterrupted: dict[int, str], ranks: int, kills: int
) -> None:
    command = [*arguments(tmp_path, digits, "m"), "--ranks", ranks]
    chance = random.Random(ranks)
    digest = kill_and_resume(command, tmp_path, kills=kills, updates=UPDATES, chance=chance, environment=SLOWLY)
    assert digest == uninterrupted[ranks]


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_often_and_resumed_gives_the_same_weights(
    tmp_path: Path, digits: Path, uninterrupted: dict[int, str], ranks: int
) -> None:
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        command = [*arguments(folder, digits, "m"), "--ranks", ranks]
        digest = kill_and_resume(command, folder, kills=10, updates=UPDATES, chance=random.Random())
        assert digest == uninterrupted[ranks]


def held(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_raw_and_averaged_weights_are_those_that_training_held(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sets after the last update, the pictures that each gives, and what a teacher with `start` starts from."""
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
    whole, last = TeacherTraining.update, {}

    def update(self: TeacherTraining, step: int) -> dict[str, Tensor]:
        if step == 0:
            last["began"] = held(self._denoiser.network.state_dict())
        figures = whole(self, step)
        last["raw"], last["ema"] = held(self._denoiser.network.state_dict()), held(self.ema.tensors)
        return figures

    monkeypatch.setattr(TeacherTraining, "update", update)
    params = TeacherParams.model_validate(
        {"network": TINY["teachers.teacher.network"], "training": {"iterations": 3, "batch": 16, "validate_every": 2}}
    )
    operation = OperationParams(device="cpu")
    stage.train(params, name="a", dataset=digits, output=tmp_path / "a", operation=operation)
    kept = dict(last)
    _, card = read_card(tmp_path / "a")
    assert card.denoiser["sigma_data"] == open_dataset(digits).pixel_std
    assert not equal(kept["raw"], kept["ema"])
    for which in ("raw", "ema"):
        assert equal(load_model(tmp_path / "a", weights=which).unet.state_dict(), kept[which]), which
        run = RunParams(model="a", sampler="euler", steps=3, sigmas="models/a", weights=which, images=10)
        sample(run, name=which, model=tmp_path / "a", output=tmp_path / which, operation=operation)
    pictures = [open_samples(tmp_path / which).images(0, 10) for which in ("raw", "ema")]
    assert not np.array_equal(*pictures)

    going_on = TeacherParams(start="models/a", network=None, training=params.training)
    stage.train(going_on, name="b", dataset=digits, start=tmp_path / "a", output=tmp_path / "b", operation=operation)
    assert equal(last["began"], kept["raw"])


def test_a_teacher_of_the_version_that_lost_the_raw_weights_is_trained_again(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 2 wrote the averaged weights twice, so that nothing of it may count as today's."""
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
    body = {"network": TINY["teachers.teacher.network"], "training": {"iterations": 1, "batch": 16}}
    words = {"name": "a", "dataset": digits, "output": tmp_path / "a", "operation": OperationParams(device="cpu")}

    def trained() -> artifacts.Manifest:
        made = stage.train(TeacherParams.model_validate(body), **words)  # type: ignore[arg-type]
        assert made is not None
        return made.manifest

    assert stage.VERSION > 2
    first, updates = trained(), []
    assert first.version == stage.VERSION
    monkeypatch.setattr(
        TeacherTraining,
        "update",
        lambda self, step, whole=TeacherTraining.update: updates.append(step) or whole(self, step),
    )
    assert (trained(), updates) == (first, [])
    (tmp_path / "a" / "manifest.json").write_text(dataclasses.replace(first, version=2).to_json())
    assert (trained(), updates) == (first, [0])


def test_a_teacher_that_starts_from_a_model_is_trained_with_dropout_as_any_other(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
    data, world = open_dataset(digits), World(0, 1, torch.device("cpu"))
    network = TINY["teachers.teacher.network"] | {"dropout": 0.5}
    built = TeacherParams.model_validate({"network": network, "training": {"iterations": 3, "batch": 16}})
    stage.train(built, name="a", dataset=digits, output=tmp_path / "a", operation=OperationParams(device="cpu"))
    started = TeacherParams(start="models/a", network=None, training=built.training)
    losses = []
    for params, start in ((built, None), (started, tmp_path / "a")):
        training, denoiser, _ = stage.prepared(params, data, world, "host", start=start)
        assert all(module.training for module in denoiser.modules())
        seed_torch(0, 0, 0)
        batch = training._loader.batch(0)
        losses.append([training._loss(training._trained, batch, slice(None)).item() for _ in range(2)])
    assert all(first != second for first, second in losses), "dropout draws anew"


def test_the_average_of_a_short_training_is_better_than_its_start_and_close_to_its_last_weights(digits: Path) -> None:
    """Under the default parameters of the average, which then has forgotten the initial weights."""
    network = TINY["teachers.teacher.network"]
    training = {"iterations": 60, "batch": 16, "validate_every": 60, "learning_rate": 5e-3, "optimizer": {"warmup": 5}}
    params = TeacherParams.model_validate({"network": network, "training": training})
    made, denoiser, _ = stage.prepared(params, open_dataset(digits), World(0, 1, torch.device("cpu")), "host")
    began = made.validate(0)["validation_loss"]
    for step in range(60):
        made.update(step)
    averaged = made.validate(60)["validation_loss"]
    made.ema.load(denoiser.network.state_dict())
    last = made.validate(60)["validation_loss"]
    assert made.warnings == []
    assert averaged < 0.6 * began
    assert averaged < 1.1 * last


def test_sigma_data_is_measured_stated_or_that_of_the_model_it_starts_from(tmp_path: Path, digits: Path) -> None:
    data = dataclasses.replace(open_dataset(digits), pixel_std=0.583)
    assert stage.resolved(TrainedEdmParams(), data) == EdmParams(sigma_data=0.583)
    assert stage.resolved(TrainedEdmParams(sigma_data=0.4, p_std=1.0), data) == EdmParams(sigma_data=0.4, p_std=1.0)
    made = load_model(make_model(tmp_path / "made").path)
    assert stage.resolved(TrainedEdmParams(), data, made) == EdmParams(sigma_data=0.5)
    assert stage.resolved(FlowParams(kind="flow"), data) == FlowParams(kind="flow")
    with pytest.raises(InputError, match="are equal: set the denoiser's sigma_data"):
        stage.resolved(TrainedEdmParams(), dataclasses.replace(data, pixel_std=0.0))


def test_saving_a_model_leaves_its_network_and_every_set_of_weights_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = load_model(make_model(tmp_path / "made").path)
    unet, own = made.unet, held(made.unet.state_dict())
    half = {name: 0.5 * tensor for name, tensor in own.items()}
    (tmp_path / "m").mkdir()
    copies: list[object] = []
    monkeypatch.setattr(model, "on_host", lambda state: copies.append(state) or held(state))
    save_model(tmp_path / "m", made.card, unet, {"ema": half, "raw": unet.state_dict()})  # shares memory with unet
    assert len(copies) == 1, "a large network's weights are held once more, not three times"
    assert equal(unet.state_dict(), own)
    (tmp_path / "m" / "manifest.json").write_bytes((tmp_path / "made" / "manifest.json").read_bytes())
    assert equal(load_model(tmp_path / "m", weights="raw").unet.state_dict(), own)
    assert equal(load_model(tmp_path / "m").unet.state_dict(), half)


def test_an_average_that_cannot_forget_its_start_is_named_once_and_in_the_summary(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "the averaged weights will still be 98% initial weights after 20 updates: train longer or lower ema.decay"
    said += " or set ema.warmup=true"
    for warmup in (True, False):
        training = {"iterations": 20, "batch": 4, "validate_every": 0, "ema": {"decay": 0.999, "warmup": warmup}}
        command = arguments(tmp_path, digits, f"m-{warmup}", **{"teachers.teacher.training": training})
        here(*command, runs=tmp_path / "runs")
        assert capsys.readouterr().err.count(f"teacher: {said}\n") == (not warmup)
        summary = json.loads((tmp_path / f"m-{warmup}" / "manifest.json").read_text())["summary"]
        assert summary.get("warnings") == (None if warmup else [said])


def test_a_stop_request_saves_the_state_and_says_so(
    tmp_path: Path, digits: Path, uninterrupted: dict[int, str]
) -> None:
    runs, command = tmp_path / "runs", [*arguments(tmp_path, digits, "m"), "--ranks", 2]
    attempt = Command(*command, runs=runs, environment=SLOWLY)
    assert attempt.wait_until(lambda: steps_logged(runs) >= 5)
    attempt.process.send_signal(signal.SIGTERM)
    assert attempt.wait() == 75, attempt.output
    assert "state saved: start it again" in attempt.output
    assert not (tmp_path / "m").exists()
    code, output = run(*command, runs=runs)
    assert code == 0, output
    assert "going on after update" in output
    assert payload(tmp_path / "m") == uninterrupted[2]


def test_a_deadline_stops_and_resumes(
    tmp_path: Path, digits: Path, uninterrupted: dict[int, str], capsys: pytest.CaptureFixture[str]
) -> None:
    runs, command = tmp_path / "runs", arguments(tmp_path, digits, "m")
    here(*command, "--deadline-min", "0", runs=runs, code=75)
    assert "time limit" in capsys.readouterr().err
    here(*command, runs=runs)
    assert payload(tmp_path / "m") == uninterrupted[1]


@pytest.mark.parametrize("victim", [0])
def test_a_killed_rank_ends_the_others(tmp_path: Path, digits: Path, victim: int) -> None:
    long = TINY["teachers.teacher.training"] | {"iterations": 100_000}
    runs = tmp_path / "runs"
    attempt = Command(*arguments(tmp_path, digits, "m", **{"teachers.teacher.training": long}), "--ranks", 2, runs=runs)
    assert attempt.wait_until(lambda: steps_logged(runs) >= 3)
    ranks = attempt.children()
    assert len(ranks) == 2
    os.kill(ranks[victim], signal.SIGKILL)
    assert attempt.wait() == 3, attempt.output
    assert f"rank {victim} was ended by SIGKILL" in attempt.output
    assert not any(alive(pid) for pid in ranks)


def test_a_killed_launcher_takes_its_ranks_along_and_another_number_of_ranks_goes_on(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = TINY["teachers.teacher.training"] | {"iterations": 100}
    runs, command = tmp_path / "runs", arguments(tmp_path, digits, "m", **{"teachers.teacher.training": longer})
    attempt = Command(*command, "--ranks", 2, runs=runs, fresh=True)
    assert attempt.wait_until(lambda: steps_logged(runs) >= 5)
    ranks = attempt.children()
    assert len(ranks) == 2
    attempt.process.kill()
    attempt.wait()
    wait_for_end(ranks)
    here(*command, runs=runs)
    assert "going on after update" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_names_its_update_and_keeps_the_last_good_state(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = {
        "iterations": 300,
        "batch": 16,
        "learning_rate": 1.0,
        "optimizer": {"warmup": 0, "clip": 0, "weight_decay": 0.0, "betas": [0.0, 0.0]},
    }
    changes = {"teachers.teacher.training": wild, "teachers.teacher.denoiser": {"p_mean": 300.0}}
    here(*arguments(tmp_path, digits, "m", **changes), runs=tmp_path / "runs", code=3)
    output = capsys.readouterr().err
    assert "became" in output
    assert "at update" in output
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teachers.teacher.network": {"channels": [8] * 5, "attention": [False] * 5, "norm_groups": 4}},
            "8 pixels cannot be",
        ),
        ({"teachers.teacher.training.batch": 15}, "cannot be shared by"),
        ({"teachers.teacher.training.learning_rate": 7}, "teachers.teacher.training.learning_rate=7"),
        ({"teachers.teacher.training.itterations": 7}, "did you mean 'iterations'?"),
        ({"teachers.teacher.network.norm_groups": 3}, "norm_groups=3 does not divide 8 channels"),
        ({"operation.device": "cuda"}, "torch sees no GPU here"),
    ],
)
def test_wrong_parameters_are_one_line_and_exit_2(
    tmp_path: Path,
    digits: Path,
    changes: dict[str, object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))
    code = cli.main([str(argument) for argument in arguments(tmp_path, digits, "m", **changes)])
    output = capsys.readouterr().err
    lines = [line for line in output.splitlines() if line.startswith("pipestill train:")]
    assert code == 2, output
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "m").exists()
