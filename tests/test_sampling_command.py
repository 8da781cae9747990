"""`pipestill sample` as a command: over ranks, killed, stopped, resumed; and what it refuses."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from commands import Command, alive, here, payload, run, write_params
from pipestill import cli
from pipestill.networks.model import NativeSchedule
from pipestill.sampling.store import open_samples
from tiny_models import make_model

IMAGES = 150
STUDENT = NativeSchedule(steps=4, transition="euler", sigma_max=8.0, sigma_min=0.05, rho=7.0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "teacher").path


def arguments(folder: Path, model: Path, **changes: object) -> list[object]:
    """The command line of a run named `run`, its output `folder/samples`."""
    entry = {"model": "teacher", "sampler": "renoise", "steps": 4, "sigmas": "models/teacher"}
    entry |= {"images": IMAGES, "micro_batch": 8, "seeds": [3]} | changes
    tuned = {"teacher": {"solvers": [{"sampler": entry["sampler"], "steps": entry["steps"]}]}}
    body = {
        "sampling.runs": {"run": entry},
        "reference.floor.counts": [entry["images"]],
        "tune": tuned if str(entry["sigmas"]).startswith("tuned") else {},
        "operation.device": "cpu",
    }
    params = write_params(folder / "params.yaml", **body)
    return ["sample", "--name", "run", "--model", model, "--output", folder / "samples", "--params", params]


def finished(runs: Path) -> dict[str, tuple[int, int]]:
    """Finished blocks in any state below a runs folder, by name: inode and time of writing."""
    blocks = {}
    for path in runs.glob("sample/*/state/blocks/*.npy"):
        with suppress(FileNotFoundError):  # published meanwhile
            blocks[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return blocks


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> str:
    folder = tmp_path_factory.mktemp("whole")
    code, output = run(*arguments(folder, teacher), runs=folder / "runs")
    assert code == 0, output
    assert "150 images for each of 1 seeds, renoise at 4 steps, 4 evaluations an image, 1 ranks" in output
    return payload(folder / "samples")


def test_a_number_of_images_without_a_floor_is_sampled(tmp_path: Path, teacher: Path) -> None:
    here(*arguments(tmp_path, teacher), "sampling.runs.run.images=5", runs=tmp_path / "runs")
    assert open_samples(tmp_path / "samples").count == 5


def test_a_listed_plan_takes_names_and_numbers(tmp_path: Path, teacher: Path) -> None:
    command = arguments(tmp_path, teacher, images=4, plan="listed", classes=["two", 0])
    here(*command, runs=tmp_path / "runs")
    assert open_samples(tmp_path / "samples").labels.tolist() == [2, 0, 2, 0]
    code, output = run(*command, "sampling.runs.run.classes=[tow]", runs=tmp_path / "runs")
    assert code == 2
    assert "there is no class 'tow'; did you mean 'two'?" in output


@pytest.mark.parametrize("ranks", [3])
def test_any_number_of_ranks_gives_the_same_bytes(tmp_path: Path, teacher: Path, undisturbed: str, ranks: int) -> None:
    code, output = run(*arguments(tmp_path, teacher), "--ranks", ranks, runs=tmp_path / "runs")
    assert code == 0, output
    assert f"{ranks} ranks" in output
    assert payload(tmp_path / "samples") == undisturbed
    code, output = run(*arguments(tmp_path, teacher), "--ranks", ranks, runs=tmp_path / "runs")
    assert code == 0, output
    assert output.count("is there and verifies: nothing to do") == 1


def kill_and_resume(folder: Path, command: list[object], kills: int, chance: random.Random, blocks: int) -> None:
    """Kills the whole command after random numbers of blocks, then lets it end; no finished block is redone."""
    runs = folder / "runs"
    kept: dict[str, tuple[int, int]] = {}
    landed = 0
    for left in range(kills, 0, -1):
        target = len(kept) + chance.randint(1, max(1, (blocks - len(kept)) // left))
        attempt = Command(*command, runs=runs)
        if attempt.wait_until(lambda target=target: len(finished(runs)) >= target):  # type: ignore[misc]
            landed += attempt.kill_all()
        if (folder / "samples").exists():
            break
        now = finished(runs)
        assert {name: now.get(name) for name in kept} == kept
        kept = now
    assert landed, "it ended before any kill"
    code, output = run(*command, runs=runs)
    assert code == 0, output


@pytest.mark.parametrize("ranks", [2])
def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path, teacher: Path, undisturbed: str, ranks: int) -> None:
    command = [*arguments(tmp_path, teacher), "--ranks", ranks]
    kill_and_resume(tmp_path, command, 2, random.Random(ranks), -(-IMAGES // 8))
    assert payload(tmp_path / "samples") == undisturbed


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_thousand_images_on_one_two_and_three_ranks_killed_ten_times(tmp_path: Path, teacher: Path) -> None:
    """Kills at random moments of the clock too: in start-up, between blocks, while the artefact is put together."""
    digests = set()
    chance = random.Random()
    whole: dict[str, object] = {"images": 1000, "sampler": "heun", "steps": 10}
    for ranks in (1, 2, 3):
        folder = tmp_path / f"whole-{ranks}"
        folder.mkdir()
        begun = time.monotonic()
        code, output = run(*arguments(folder, teacher, **whole), "--ranks", ranks, runs=folder / "runs")
        seconds = time.monotonic() - begun
        assert code == 0, output
        digests.add(payload(folder / "samples"))
        by_blocks, by_clock = tmp_path / f"blocks-{ranks}", tmp_path / f"clock-{ranks}"
        by_blocks.mkdir()
        kill_and_resume(by_blocks, [*arguments(by_blocks, teacher, **whole), "--ranks", ranks], 10, chance, 125)
        digests.add(payload(by_blocks / "samples"))
        by_clock.mkdir()
        command = [*arguments(by_clock, teacher, **whole), "--ranks", ranks]
        for _ in range(10):
            attempt = Command(*command, runs=by_clock / "runs")
            with suppress(subprocess.TimeoutExpired):
                attempt.process.wait(chance.uniform(0, 1.2 * seconds))
            if attempt.process.poll() is None:
                attempt.kill_all()
        code, output = run(*command, runs=by_clock / "runs")
        assert code == 0, output
        digests.add(payload(by_clock / "samples"))
    assert len(digests) == 1


def test_another_number_of_ranks_goes_on_with_the_same_blocks(tmp_path: Path, teacher: Path, undisturbed: str) -> None:
    runs, command = tmp_path / "runs", arguments(tmp_path, teacher)
    attempt = Command(*command, "--ranks", 2, runs=runs)
    assert attempt.wait_until(lambda: len(finished(runs)) >= 4)
    attempt.kill_all()
    code, output = run(*command, runs=runs)
    assert code == 0, output
    assert "of 150 images are there already: going on" in output
    assert payload(tmp_path / "samples") == undisturbed


@pytest.mark.parametrize("ranks", [2])
def test_a_stop_request_keeps_finished_blocks(tmp_path: Path, teacher: Path, ranks: int) -> None:
    runs = tmp_path / "runs"
    command = [*arguments(tmp_path, teacher, images=100_000), "--ranks", ranks]
    attempt = Command(*command, runs=runs)
    assert attempt.wait_until(lambda: len(finished(runs)) >= 3)
    attempt.process.send_signal(signal.SIGTERM)
    assert attempt.wait() == 75, attempt.output
    assert "of 100000 images, all kept: start it again to go on" in attempt.output
    kept = finished(runs)
    assert len(kept) >= 3
    assert not (tmp_path / "samples").exists()
    code, output = run(*command, "--deadline-min", "0", runs=runs)
    assert code == 75, output
    assert f"with {8 * len(kept)} of 100000 images" in output
    assert finished(runs) == kept


@pytest.mark.parametrize("victim", [1])
def test_a_killed_rank_ends_the_others(tmp_path: Path, teacher: Path, victim: int) -> None:
    runs = tmp_path / "runs"
    attempt = Command(*arguments(tmp_path, teacher, images=100_000), "--ranks", 2, runs=runs)
    assert attempt.wait_until(lambda: len(finished(runs)) >= 3)
    ranks = attempt.children()
    assert len(ranks) == 2
    os.kill(ranks[victim], signal.SIGKILL)
    assert attempt.wait() == 3, attempt.output
    assert f"rank {victim} was ended by SIGKILL" in attempt.output
    assert not any(alive(pid) for pid in ranks)
    assert len(finished(runs)) >= 3


def test_a_broken_model_is_one_line_over_ranks(tmp_path: Path) -> None:
    broken = make_model(tmp_path / "broken", broken=True).path
    code, output = run(*arguments(tmp_path, broken), "--ranks", 2, runs=tmp_path / "runs")
    assert code == 3, output
    lines = [line for line in output.splitlines() if line.startswith("pipestill sample:")]
    assert len(lines) == 1
    assert "of seed 3 is not finite" in lines[0]
    assert "Traceback" not in output
    assert not (tmp_path / "samples").exists()


def refuse(
    folder: Path, command: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Runs a command in this process: its exit code and its one line."""
    monkeypatch.setenv("PIPESTILL_RUNS", str(folder / "runs"))
    code = cli.main([str(argument) for argument in command])
    output = capsys.readouterr().err
    lines = [line for line in output.splitlines() if line.startswith("pipestill sample:")]
    assert len(lines) == 1, output
    assert "Traceback" not in output
    assert not (folder / "samples").exists()
    return code, lines[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": 1.5}, "has no unconditional branch: use guidance=1"),
        ({"plan": "none"}, "was not trained without a class"),
        (
            {"plan": "listed", "classes": [0, 3]},
            "classes of model teacher: there is no class number 3, they run from 0 to 2",
        ),
        ({"plan": "data"}, "give --dataset"),
        ({"sampler": "native", "steps": 5}, "steps=5, but model teacher was distilled for 4 steps"),
        ({"sampler": "euler", "steps": None}, "sampler euler needs steps"),
        ({"sampler": "eular"}, "sampler=eular: input should be"),
        ({"images": 0}, "images=0"),
        ({"micro_bach": 8}, "did you mean 'micro_batch'?"),
        ({"sigmas": "tuned/teacher", "sampler": "2m"}, "give --sigmas"),
    ],
)
def test_wrong_runs_are_one_line_and_exit_2(
    tmp_path: Path,
    changes: dict[str, object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make_model(tmp_path / "model", native=STUDENT, unconditional=False).path
    code, line = refuse(tmp_path, arguments(tmp_path, model, **changes), monkeypatch, capsys)
    assert code == 2
    assert message in line


def test_wrong_places_are_one_line_and_exit_2(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(tmp_path, tmp_path / "nowhere")
    assert "does not exist: a model artefact was expected" in refuse(tmp_path, command, monkeypatch, capsys)[1]
    command = arguments(tmp_path, teacher)
    command[command.index("run")] = "runn"
    code, line = refuse(tmp_path, command, monkeypatch, capsys)
    assert code == 2
    assert "sampling.runs has no entry 'runn'" in line


def test_a_full_disk_is_one_line_and_exit_3(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = os.fsync, []

    def filling_up(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr("os.fsync", filling_up)
    code, line = refuse(tmp_path, arguments(tmp_path, teacher), monkeypatch, capsys)
    assert code == 3
    assert "could not be written: No space left on device" in line
    assert len(finished(tmp_path / "runs")) == 2
    monkeypatch.setattr("os.fsync", real)
    assert cli.main([str(argument) for argument in arguments(tmp_path, teacher)]) == 0


def test_an_output_that_is_being_written_is_refused(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    command = arguments(tmp_path, teacher, images=100_000)
    attempt = Command(*command, runs=runs)
    assert attempt.wait_until(lambda: len(finished(runs)) >= 1)
    code, line = refuse(tmp_path, command, monkeypatch, capsys)
    attempt.kill_all()
    assert code == 3
    assert "is being written by another process" in line
