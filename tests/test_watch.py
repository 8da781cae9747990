"""`pipestill evaluate --watch`: beside a training, killed with it, late, and with what does not belong together."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import Command, here, payload, run, steps_logged, write_params
from pipestill import cli
from pipestill.distributed import World
from pipestill.errors import InputError
from pipestill.evaluation import matching
from pipestill.evaluation.matching import Match
from pipestill.evaluation.reference import open_reference
from pipestill.networks.model import load_model
from pipestill.stages import watch as stage
from pipestill.stages.watch import Table
from pipestill.training import following
from pipestill.training import state as states

UPDATES = 120
RUN = {
    "model": "teacher",
    "sampler": "euler",
    "steps": 2,
    "sigmas": "models/teacher",
    "images": 20,
    "seeds": [0, 1],
    "micro_batch": 10,
}
TINY: dict[str, Any] = {
    "teachers.teacher.network": {"channels": [8, 16], "layers": 1, "attention": [False, False], "norm_groups": 4},
    "teachers.teacher.training": {"iterations": UPDATES, "batch": 16, "validate_every": 0},
    "tune": {},
    "sampling.runs": {"watched": RUN},
    "reference.floor.counts": [20],
    "operation": {"save_every": 0.001, "log_every": 1, "keep_states": 2},
}


def setting(folder: Path, **changes: object) -> Path:
    return write_params(folder / "params.yaml", **(TINY | changes))


def training(folder: Path, digits: Path, params: Path) -> list[object]:
    return ["train", "--name", "teacher", "--dataset", digits, "--output", folder / "m", "--params", params]


def watching(folder: Path, reference: Path, params: Path, output: str = "watched") -> list[object]:
    places = ["--watch", folder / "m", "--reference", reference, "--output", folder / output]
    return ["evaluate", "--name", "watched", *places, "--params", params]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "checkpoints.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def noted(runs: Path) -> list[int]:
    (listing,) = runs.glob("train/*/saved.txt")
    return [int(line) for line in listing.read_text().split()]


def check_books(folder: Path, runs: Path) -> list[dict[str, str]]:
    """Every state that was ever saved has one row, and the published model the last."""
    found = rows(folder / "watched")
    assert [int(row["step"]) for row in found[:-1]] == noted(runs)
    assert found[-1]["checkpoint"] == "published"
    assert int(found[-1]["step"]) == UPDATES
    assert {row["status"] for row in found} <= {"evaluated", "pruned"}
    for row in found:
        assert bool(row["fd_efficientnet_lite0"]) == (row["status"] == "evaluated")
    assert not list((folder / "watched" / "pending").iterdir())
    return found


def disturb(folder: Path, digits: Path, reference: Path, *, kills: int, chance: random.Random) -> None:
    """Kills training and watch at random moments and starts them again, until both have ended by themselves."""
    params, runs = setting(folder), folder / "runs"
    trained = Command(*training(folder, digits, params), runs=runs)
    assert trained.wait_until(lambda: steps_logged(runs) >= 1), trained.output
    watched = Command(*watching(folder, reference, params), runs=runs)
    said = []
    for _ in range(kills):
        time.sleep(chance.uniform(0.5, 5.0))
        if chance.random() < 0.5 and trained.process.poll() is None:
            trained.kill_all()
            trained = Command(*training(folder, digits, params), runs=runs)
        elif watched.process.poll() is None:
            watched.kill_all()
            said.append(watched.output)
            watched = Command(*watching(folder, reference, params), runs=runs)
    assert trained.wait() == 0, trained.output
    assert watched.wait() == 0, watched.output
    said.append(watched.output)
    check_books(folder, runs)
    told = re.findall(r"(state-\d+|published): fd_", "".join(said))
    assert len(told) == len(set(told))  # each once
    if kills < 5:
        assert told


def test_each_state_is_evaluated_once_or_named_as_pruned(tmp_path: Path, digits: Path, digits_reference: Path) -> None:
    disturb(tmp_path, digits, digits_reference, kills=4, chance=random.Random(3))

    # what the table says of the published model is what sampling and evaluating it say
    params, runs = setting(tmp_path), tmp_path / "runs"
    found = rows(tmp_path / "watched")
    evaluated = [row for row in found if row["status"] == "evaluated"]
    best = min(evaluated, key=lambda row: float(row["fd_efficientnet_lite0"]))
    manifest = json.loads((tmp_path / "watched" / "best" / "manifest.json").read_text())
    assert manifest["parameters"]["checkpoint"] == best["checkpoint"]
    for model, row in (("m", found[-1]), ("watched/best", best)):
        samples, figures = tmp_path / "samples", tmp_path / "figures"
        sampling = ["--model", tmp_path / model, "--output", samples, "--params", params]
        here("sample", "--name", "watched", *sampling, runs=runs)
        places = ["--samples", samples, "--reference", digits_reference, "--output", figures, "--params", params]
        here("evaluate", "--name", "watched", *places, runs=runs)
        metrics = json.loads((figures / "metrics.json").read_text())
        for name in ("fd_efficientnet_lite0", "fd_classifier", "kid_classifier", "class_accuracy"):
            assert float(row[name]) == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), (model, name)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_each_state_is_evaluated_once_however_often_killed(
    tmp_path: Path, digits: Path, digits_reference: Path
) -> None:
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        disturb(folder, digits, digits_reference, kills=20, chance=random.Random())


def test_over_two_ranks_and_from_another_disk_the_table_is_the_same(
    tmp_path: Path, digits: Path, digits_reference: Path
) -> None:
    """Beside a stopped training whose states were all kept; a copy stands in where there are no hard links."""
    endless = TINY["teachers.teacher.training"] | {"iterations": 100_000}  # it cannot end before it is stopped
    keeping = TINY["operation"] | {"keep_states": 1000}
    params = setting(tmp_path, operation=keeping, **{"teachers.teacher.training": endless})
    runs = tmp_path / "runs"
    trained = Command(*training(tmp_path, digits, params), runs=runs)
    assert trained.wait_until(lambda: len(list(runs.glob("train/*/state/*.pt"))) >= 3), trained.output
    trained.process.send_signal(signal.SIGTERM)
    assert trained.wait() == 75

    def watch_for(count: int, output: str, *more: object, environment: dict[str, str] | None = None) -> str:
        command = Command(
            *watching(tmp_path, digits_reference, params, output), *more, runs=runs, environment=environment
        )
        table = tmp_path / output / "checkpoints.csv"
        assert command.wait_until(lambda: table.exists() and len(rows(tmp_path / output)) == count), command.output
        command.process.send_signal(signal.SIGTERM)
        assert command.wait() == 75, command.output
        assert all(row["status"] == "evaluated" for row in rows(tmp_path / output))
        return table.read_text()

    count = len(noted(runs))
    whole = watch_for(count, "one")
    assert watch_for(count, "two", "--ranks", 2) == whole
    unlinked = tmp_path / "site"
    unlinked.mkdir()
    (unlinked / "sitecustomize.py").write_text(
        "import os\ndef link(*_):\n    raise OSError(18, 'Invalid cross-device link')\nos.link = link\n"
    )
    assert watch_for(count, "three", environment={"PYTHONPATH": str(unlinked)}) == whole


def test_a_watch_that_comes_late_names_what_was_pruned(
    tmp_path: Path, digits: Path, digits_reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params, runs = setting(tmp_path), tmp_path / "runs"
    code, output = run(*training(tmp_path, digits, params), runs=runs)
    assert code == 0, output
    assert f"states: {runs}" in output
    here(*watching(tmp_path, digits_reference, params), runs=runs)
    found = check_books(tmp_path, runs)
    assert [row["status"] for row in found] == ["pruned"] * (len(found) - 1) + ["evaluated"]
    assert f"{len(found) - 1} states were pruned before they could be evaluated: state-" in capsys.readouterr().err
    before = payload(tmp_path / "watched" / "best"), (tmp_path / "watched" / "checkpoints.csv").read_text()
    here(*watching(tmp_path, digits_reference, params), runs=runs)
    assert (payload(tmp_path / "watched" / "best"), (tmp_path / "watched" / "checkpoints.csv").read_text()) == before

    # one whose weights have gone astray, and one that cannot be read
    (work,) = runs.glob("train/*/training.json")
    (work.parent / "state").mkdir()
    key = json.loads(work.read_text())["key"]
    astray = {name: tensor * torch.nan for name, tensor in load_model(tmp_path / "m").unet.state_dict().items()}
    states.save(work.parent / "state", 99998, {"training": {"ema": astray}}, key=key)
    (work.parent / "state" / "state-000099999.pt").write_bytes(b"PK\x03\x04 not whole")
    here(*watching(tmp_path, digits_reference, params), runs=runs)
    told = [(row["step"], row["status"], row["fd_classifier"]) for row in rows(tmp_path / "watched")[-2:]]
    assert told == [("99998", "not finite", ""), ("99999", "unreadable", "")]
    assert not list((tmp_path / "watched" / "pending").iterdir())
    here(*watching(tmp_path, digits_reference, params), runs=runs)
    assert payload(tmp_path / "watched" / "best") == before[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A folder in which a short training has ended."""
    folder = tmp_path_factory.mktemp("trained")
    short = {"iterations": 2, "batch": 16, "validate_every": 0, "label_dropout": 0.0}
    params = setting(folder, **{"teachers.teacher.training": short})
    code, output = run(*training(folder, digits, params), runs=folder / "runs")
    assert code == 0, output
    return folder


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"sampling.runs": {"watched": RUN | {"weights": "raw"}}}, [], "name one with weights=ema and without tuned"),
        ({}, ["--by", "fd_classifer"], "there is no such figure; did you mean 'fd_classifier'?"),
        ({}, ["--metrics", "m.json"], "--metrics belongs to --samples"),
        ({}, ["--samples", "s"], "not allowed with argument --watch"),
        ({"sampling.runs": {"watched": RUN | {"plan": "data"}}}, [], "give --dataset"),
        ({"sampling.runs": {"watched": RUN | {"guidance": 2.0}}}, [], "has no unconditional branch"),
    ],
)
def test_what_does_not_fit_is_one_line_and_exit_2(
    tmp_path: Path,
    trained: Path,
    digits_reference: Path,
    changes: dict[str, object],
    more: list[object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    params = setting(tmp_path, **changes)
    places = ["--watch", trained / "m", "--reference", digits_reference, "--output", tmp_path / "watched"]
    command = ["evaluate", "--name", "watched", *places, "--params", params, *more]
    monkeypatch.setenv("PIPESTILL_RUNS", str(trained / "runs"))
    assert cli.main([str(word) for word in command]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("pipestill evaluate: ")
    assert message in last
    assert not (tmp_path / "watched").exists()


def test_a_figure_that_the_plan_does_not_have_is_refused_at_the_start(
    digits_reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    against = open_reference(digits_reference)
    assert stage._figure("kid_classifier", against, "balanced") == "kid_classifier"
    note = "no KID: class '3' has only 2 test images, too few for subsets in this mix"
    monkeypatch.setattr(matching, "match", lambda *_: Match("balanced", notes=("classes without images", note)))
    assert stage._figure("fd_classifier", against, "balanced") == "fd_classifier"
    with pytest.raises(InputError, match="--by kid_classifier: there is no KID: class '3' has only 2 test images"):
        stage._figure("kid_classifier", against, "balanced")


def test_a_state_that_another_rank_cannot_read_is_no_wrong_state(
    tmp_path: Path,
    trained: Path,
    digits_reference: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    params = setting(tmp_path)
    places = ["--watch", trained / "m", "--reference", digits_reference, "--output", tmp_path / "watched"]
    command = [str(word) for word in ["evaluate", "--name", "watched", *places, "--params", params]]
    monkeypatch.setenv("PIPESTILL_RUNS", str(trained / "runs"))
    with monkeypatch.context() as patch:
        patch.setattr(World, "gather", lambda self, value: [value, True])
        assert cli.main(command) == 3
    assert "some ranks can read published and some cannot" in capsys.readouterr().err
    written = tmp_path / "watched" / "checkpoints.csv"
    assert not written.exists() or "published" not in written.read_text()
    assert cli.main(command) == 0
    assert rows(tmp_path / "watched")[-1]["status"] == "evaluated"


def test_one_state_is_held_at_a_time_and_what_a_kill_left_is_swept(tmp_path: Path, trained: Path) -> None:
    (work,) = (trained / "runs").glob("train/*/training.json")
    told = replace(following.read(work.parent), output=tmp_path / "nowhere")
    folder, output = tmp_path / "training", tmp_path / "watched"
    (folder / "state").mkdir(parents=True)
    for step in (1, 2, 3, 4):
        (folder / "state" / f"state-{step:09d}.pt").write_bytes(b"state")
    following.note(folder, 1, 2, 3, 4, 5)
    output.mkdir()
    (output / ".watch.json.77.partial").write_text("{")  # killed in its first write

    def held() -> list[str]:
        return sorted(path.name for path in (output / "pending").iterdir())

    table = Table(folder, told, output, {"by": "fd_classifier"})
    assert table.next() == "state-000000001"
    assert held() == ["state-000000001.pt"]
    assert [(row["step"], row["status"]) for row in rows(output)] == [("5", "pruned")]
    (folder / "state" / "state-000000001.pt").unlink()
    (folder / "state" / "state-000000002.pt").unlink()
    (output / "pending" / "state-000000009.partial").write_bytes(b"killed in its copy")

    table = Table(folder, told, output, {"by": "fd_classifier"})  # started again
    assert table.next() == "state-000000001"
    assert held() == ["state-000000001.pt"]
    table.add("state-000000001", {"fd_classifier": math.nan}, {})
    assert table.next() == "state-000000003"
    assert held() == ["state-000000003.pt"]
    table.add("state-000000003", None, None)
    assert [(row["step"], row["status"]) for row in rows(output)] == [
        ("1", "evaluated"),
        ("2", "pruned"),
        ("3", "unreadable"),
        ("5", "pruned"),
    ]
    assert "best" not in table.standing  # a figure that is none is not the lowest
    with pytest.raises(InputError, match="another training, run, reference or --by"):
        Table(folder, told, output, {"by": "fd_inception"})


def test_places_that_are_none_of_a_watch_are_refused(
    tmp_path: Path,
    trained: Path,
    digits_reference: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    params, runs = setting(tmp_path), trained / "runs"
    monkeypatch.setenv("PIPESTILL_RUNS", str(runs))

    def refused(output: Path, place: Path = trained / "m") -> str:
        places = ["--watch", place, "--reference", digits_reference, "--output", output, "--params", params]
        assert cli.main(["evaluate", "--name", "watched", *map(str, places)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    assert "holds files that do not belong to a table of evaluated checkpoints" in refused(tmp_path / "other")
    assert (tmp_path / "other" / "letter.txt").exists()
    assert "no training below" in refused(tmp_path / "new", tmp_path / "nowhere")
    (work,) = runs.glob("train/*/training.json")
    (runs / "train" / "older").mkdir()
    (runs / "train" / "older" / "training.json").write_text("{}")  # of another version
    assert "lies in the training's own folder" in refused(work.parent / "watched")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "watch.json").write_text("{}")
    assert "is of another training, run, reference or --by" in refused(tmp_path / "mine")
