"""Trackers: the real packages give back what was logged, offline; a broken one ends itself, not the training."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipestill.errors import InputError
from pipestill.training import tracking
from pipestill.training.tracking import open_trackers

PARAMETERS = {"seed": 3, "optimizer": {"learning_rate": 2e-3, "betas": [0.9, 0.99]}}
PICTURE = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
GREY = np.arange(6 * 8, dtype=np.uint8).reshape(6, 8, 1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder, with every address and key that trackers read from the environment out of the way."""
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path))
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "train" / "0123456789abcdef"


def use(name: str, folder: Path, first: int = 1, last: int = 3) -> None:
    """What a training does with a tracker."""
    tracker = open_trackers([name], folder, "teacher", PARAMETERS)
    for step in range(first, last + 1):
        tracker.log(step, {"loss": 1 / step, "gradient_norm": float(step)})
    tracker.image(last, "samples", PICTURE)
    tracker.image(last, "grey", GREY)
    tracker.close()


def test_the_log_is_always_kept_and_goes_on(folder: Path) -> None:
    for first in (1, 3):
        tracker = open_trackers([], folder, "teacher", PARAMETERS)
        tracker.log(first, {"loss": 0.5})
        tracker.log(first + 1, {"loss": 0.25, "validation_loss": 0.75})
        tracker.image(first, "samples", PICTURE)
        tracker.close()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[3]["validation_loss"] == 0.75
    assert all(line["time"] > 1e9 for line in lines)


def test_tensorboard_gives_back_what_was_logged(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    use("tensorboard", folder)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([1.0, 0.5, 1 / 3])
    (picture,) = events.Images("samples")
    assert (picture.step, picture.width, picture.height) == (3, 8, 6)
    text = events.Tensors("parameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| optimizer.learning_rate | 0.002 |" in text


def test_mlflow_gives_back_what_was_logged_and_resumes_its_run(folder: Path) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    use("mlflow", folder)
    use("mlflow", folder, first=4, last=4)
    client = MlflowClient(tracking_uri=(folder.parent.parent / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("pipestill")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "teacher"
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.betas"] == "[0.9, 0.99]"
    history = client.get_metric_history(run.info.run_id, "gradient_norm")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    assert any(Path(name).name.startswith("samples") and name.endswith(".png") for name in pictures)


def records(folder: Path) -> list[Any]:
    """Everything in the one offline run's file of Weights & Biases: a LevelDB log of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, body, found = file.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):
            break  # it is being written
        body += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(wandb_internal_pb2.Record.FromString(body))
            body = b""
    return found


def test_wandb_gives_back_what_was_logged_offline(folder: Path) -> None:
    pytest.importorskip("wandb")
    use("wandb", folder)
    found: list[Any] = []
    limit = time.monotonic() + 60
    while "exit" not in [record.WhichOneof("record_type") for record in found]:  # a process of its own writes the file
        assert time.monotonic() < limit, found
        found = records(folder)
    (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name, run.run_id) == ("pipestill", "teacher", "train-0123456789abcdef")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["optimizer"] == {"learning_rate": 0.002, "betas": [0.9, 0.99]}
    rows = [
        {
            item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(row["update"], row["loss"]) for row in rows if "loss" in row] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    (picture,) = [row for row in rows if "samples" in row]
    assert picture["update"] == 3
    assert len(list(folder.glob("wandb/offline-run-*/files/media/images/samples_*.png"))) == 1


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboard"), ("mlflow", "mlflow"), ("wandb", "wandb")]
)
def test_a_missing_package_is_named(name: str, package: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        InputError, match=rf"operation\.trackers: {name} is not installed .*pipestill\[tracking\]"
    ) as caught:
        open_trackers([name], folder, "teacher", PARAMETERS)
    assert "\n" not in str(caught.value)


def test_a_tracker_that_cannot_start_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://store")
    with pytest.raises(InputError, match=r"operation\.trackers: mlflow could not start .*leave it out"):
        open_trackers(["mlflow"], folder, "teacher", PARAMETERS)


class Failing:
    """Fails at its second figures and counts what it was asked."""

    asked = 0

    def __init__(self, folder: Path, run_name: str, parameters: Mapping[str, Any]) -> None:
        Failing.asked = 0

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        Failing.asked += 1
        if step == 2:
            raise RuntimeError("the store\nis gone")

    def image(self, step: int, name: str, image: Any) -> None:
        Failing.asked += 1

    def close(self) -> None:
        Failing.asked += 1


def test_a_failing_tracker_is_off_with_one_line_and_the_others_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(tracking.TRACKERS, "wandb", Failing)
    use("wandb", folder)
    warning = capsys.readouterr().err
    assert warning == ("tracker wandb is off from here on (RuntimeError: the store is gone); the training goes on\n")
    assert Failing.asked == 2
    assert len((folder / "log.jsonl").read_text().splitlines()) == 3
