"""Measurements of a training: what they are of, what is said of them, and the page."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import Command, here, write_params
from pipestill.config import PreviewParams, load
from pipestill.data.loader import Batch
from pipestill.data.store import open_dataset
from pipestill.distributed import World
from pipestill.errors import Stopped
from pipestill.launch import OUTCOME
from pipestill.reporting import scaling
from pipestill.sampling.preview import Previews
from pipestill.stages.train import prepared
from pipestill.training.clock import PHASES
from pipestill.training.measuring import ROUNDS, WARM_UP, measure
from pipestill.training.tracking import Silent

TINY = {
    "teachers.teacher.network": {"channels": [8, 8], "layers": 1, "attention": [False, False]},
    "teachers.teacher.training": {"batch": 32, "validate_every": 0},
    "operation": {"preview": {"rows": 2, "each": 1}},
}


def row(kind: str, ranks: int, seconds: float, batch: int = 100, **phases: float) -> dict[str, Any]:
    known = dict.fromkeys((*PHASES, "collectives"), 0.0) | phases
    return {
        "scaling": kind,
        "ranks": ranks,
        "batch": batch,
        "seconds": seconds,
        "images_per_second": batch / seconds,
        "phases": known,
        "preview": 0.5,
        "preview_items": 4,
        "sync": 0.01,
        "spread": 1.01,
        "parameters": 1000,
        "device": "CPU",
    }


ALONE = {"data": 0.02, "forward": 0.3, "backward": 0.6, "optimizer": 0.05, "ema": 0.01}
ROWS = [
    row("strong", 1, 1.0, **ALONE),
    row("strong", 2, 0.8, **(ALONE | {"forward": 0.15, "backward": 0.3, "collectives": 0.25})),
    row("weak", 2, 1.0, batch=200, **ALONE),
    row("weak", 1, 1.0, **ALONE),
]


def test_efficiencies_and_shares() -> None:
    found = scaling.scaled(ROWS)
    assert [each.efficiency for each in found] == [1.0, pytest.approx(0.625), 1.0, 1.0]
    assert found[0].shares == pytest.approx(ALONE | {"collectives": 0.0, "other": 0.02})
    for each in found:
        assert sum(each.shares.values()) == pytest.approx(1)
    assert found[1].shares["collectives"] == pytest.approx(0.25 / 0.8)


def test_what_holds_a_training_up_is_said_in_words() -> None:
    strong, weak, *others = scaling.words(ROWS)
    assert strong.startswith(
        "Strong scaling from 1 rank to 2: 62% (100 to 125 images/s). Of the 300 ms that an update "
    )
    assert "250 ms are collectives: gradients are exchanged once an update" in strong
    assert weak == "Weak scaling from 1 rank to 2: 100% (100 to 200 images/s): nothing is lost."
    assert others == [
        "On 1 rank, 90% of an update is the network's own forward and backward pass.",
        "A preview of 4 pictures takes 500 ms on 2 ranks: one every 200 updates is 0.3% of the time.",
    ]
    slow = [row("strong", 1, 1.0, data=0.6, forward=0.1, backward=0.2) | {"spread": 1.5}]
    assert scaling.words(slow) == [
        "On 1 rank, 60% of an update is data: keep the decoded images nearer: operation.cache=device, or host.",
        "On 1 rank, 10% of an update is other: figures, condition and start-up of each update: more images a rank.",
        "On 1 rank, 30% of an update is the network's own forward and backward pass.",
        "A preview of 4 pictures takes 500 ms on 1 rank: one every 200 updates is 0.2% of the time.",
        "Rounds of one measurement differ by a factor of 1.50: other work ran beside it.",
    ]


def test_the_page_shows_every_measurement_and_the_words() -> None:
    body = {
        "name": "teacher",
        "command": "pipestill bench",
        "parameters": 1000,
        "resolution": 8,
        "precision": "fp32",
        "device": "A & B",
        "threads": 1,
        "updates": 5,
        "rows": ROWS,
    }
    page = scaling.render(body)
    assert "A &amp; B" in page
    assert "62% (100 to 125 images/s)" in page
    assert page.count("<svg") >= 4
    assert "31.2%" in page, "the share of collectives"
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert scaling.render(body) == page


def test_a_slow_loader_is_found(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load(write_params(tmp_path / "params.yaml", **TINY))
    world = World(0, 1, torch.device("cpu"))
    training, denoiser, card = prepared(params.teachers["teacher"], open_dataset(digits), world, "host")
    begun: list[int] = []
    whole = training._loader.batch

    def slow(step: int) -> Batch:
        begun.append(step)
        time.sleep(0.03)
        return whole(step)

    monkeypatch.setattr(training._loader, "batch", slow)
    shown = PreviewParams(rows=2, each=1)
    with Previews(denoiser, card, training.ema, shown, folder=tmp_path, tracker=Silent(), world=world) as previews:
        found = measure(training, previews, world, label="teacher", batch=32, updates=2)
    assert begun == list(range(WARM_UP + ROUNDS * 2 * 2))
    assert 0.03 <= found.phases["data"] < 0.06
    assert found.phases["collectives"] == 0
    assert sum(found.phases.values()) == pytest.approx(found.seconds, rel=0.5)
    assert found.preview_items == 2
    assert found.images_per_second == 32 / found.seconds
    assert training.clock is None
    assert not training.apart


def test_the_command_measures_over_ranks(tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_params(tmp_path / "params.yaml", **TINY)
    words = ["bench", "--name", "teacher", "--dataset", digits, "--output", tmp_path / "bench", "--params", file]
    here(*words, "--ranks", "1,2", "--updates", 1, runs=tmp_path / "runs")
    body = json.loads((tmp_path / "bench" / "measurements.json").read_text())
    kinds = [(each["scaling"], each["ranks"], each["batch"]) for each in body["rows"]]
    assert kinds == [("strong", 1, 32), ("strong", 2, 32), ("weak", 2, 64), ("weak", 1, 32)]
    for each in body["rows"]:
        assert each["images_per_second"] == pytest.approx(each["batch"] / each["seconds"])
        assert all(each["phases"][name] > 0 for name in PHASES)
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "bench" / "index.html")
    assert "Strong scaling from 1 rank to 2: " in (tmp_path / "bench" / "index.html").read_text()
    assert not (tmp_path / "runs" / "train").exists(), "no training is left behind"
    assert OUTCOME not in os.environ


def test_a_measurement_stops_when_it_is_asked_to(tmp_path: Path, digits: Path) -> None:
    file = write_params(tmp_path / "params.yaml", **TINY)
    words = ["bench", "--name", "teacher", "--dataset", digits, "--output", tmp_path / "bench", "--params", file]
    command = Command(*words, "--ranks", 2, "--updates", 10**6, runs=tmp_path / "runs")
    assert command.wait_until(lambda: "measure strong, 2 ranks: " in command.output), command.output
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == Stopped.exit_code
    last = command.output.splitlines()[-1]
    assert "2 ranks, strong scaling: measuring was stopped by SIGTERM, nothing is kept" in last
    assert not (tmp_path / "bench").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ranks", "0"], "commas between them, like 1,2,4, not '0'"),
        (["--ranks", "1;2"], "like 1,2,4, not '1;2'"),
        (["--ranks", "3"], "cannot be shared by 3 ranks"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    tmp_path: Path, digits: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_params(tmp_path / "params.yaml", **TINY)
    words = ["bench", "--name", "teacher", "--dataset", digits, "--output", tmp_path / "bench", "--params", file]
    here(*words, *more, runs=tmp_path / "runs", code=2)
    assert message in capsys.readouterr().err.splitlines()[-1]
