"""Tuning: which ranges are tried, what they are measured against, which one is chosen, and how it goes on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from commands import write_params
from pipestill import cli
from pipestill.config import OperationParams, RunParams, TuneParams
from pipestill.diffusion.conditions import Condition
from pipestill.diffusion.samplers import SAMPLERS
from pipestill.diffusion.schedules import karras
from pipestill.distributed import World
from pipestill.errors import InputError, Stopped, SurroundingsError
from pipestill.evaluation.moments import Moments, frechet_distance
from pipestill.evaluation.reference import Reference, open_reference
from pipestill.networks.model import ModelCard, load_model
from pipestill.sampling import tuning
from pipestill.sampling.items import sample_items, to_uint8
from pipestill.sampling.store import open_samples
from pipestill.sampling.tuning import Candidate, as_csv, candidates, choose, measure_all
from pipestill.stages.sample import sample
from pipestill.stages.tune import tune
from tiny_models import make_model

CPU = OperationParams(device="cpu")


def tune_params(**changes: Any) -> TuneParams:
    body: dict[str, Any] = {
        "solvers": [{"sampler": "euler", "steps": 2}, {"sampler": "renoise", "steps": 2}],
        "sigma_max": [20.0, 8.0],
        "sigma_min": [0.05, 0.15],
        "extractor": "classifier",
        "images": 21,
        "micro_batch": 8,
    }
    return TuneParams(**(body | changes))


@pytest.fixture(autouse=True)
def _runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, digits_reference: Path) -> Path:
    classes = open_reference(digits_reference).classes
    return make_model(tmp_path_factory.mktemp("models") / "teacher", classes=classes).path


RANGE = (0.002, 80.0)  # of the teacher


def alone() -> World:
    return World(0, 1, torch.device("cpu"))


# --- what is tried, what is chosen


def test_every_solver_tries_every_range_those_of_one_sigma_max_together() -> None:
    wanted = candidates(tune_params(), *RANGE)
    assert len(wanted) == len(set(wanted)) == 2 * 2 * 2
    assert [candidate.sigma_max for candidate in wanted] == [20.0] * 4 + [8.0] * 4
    assert {(candidate.sampler, candidate.sigma_max, candidate.sigma_min) for candidate in wanted} == {
        (sampler, high, low) for sampler in ("euler", "renoise") for high in (20.0, 8.0) for low in (0.05, 0.15)
    }


def test_one_step_has_no_sigma_min_to_choose() -> None:
    wanted = candidates(tune_params(solvers=[{"sampler": "heun", "steps": 1}]), *RANGE)
    assert [(candidate.sigma_max, candidate.sigma_min) for candidate in wanted] == [(20.0, 0.05), (8.0, 0.05)]


def test_noise_levels_beyond_the_models_become_its_own() -> None:
    wanted = candidates(tune_params(sigma_max=[80.0, 20.0, 8.0], sigma_min=[0.002, 0.05, 0.15]), 0.1, 14.6)
    assert {(candidate.sigma_max, candidate.sigma_min) for candidate in wanted} == {
        (high, low) for high in (14.6, 8.0) for low in (0.1, 0.15)
    }


def test_a_range_the_wrong_way_round_is_left_out() -> None:
    wanted = candidates(tune_params(sigma_max=[8.0, 0.1]), *RANGE)
    assert {(candidate.sigma_max, candidate.sigma_min) for candidate in wanted} == {
        (8.0, 0.05),
        (8.0, 0.15),
        (0.1, 0.05),
    }


def test_the_least_distance_is_chosen_the_first_of_equals() -> None:
    distances = {
        Candidate("euler", 4, 20.0, 0.05): 3.0,
        Candidate("euler", 4, 20.0, 0.15): 2.0,
        Candidate("2m", 4, 20.0, 0.05): 1.0,
        Candidate("euler", 4, 8.0, 0.05): 2.0,
    }
    chosen = choose(distances, rho=7.0)
    assert list(chosen) == ["euler-4", "2m-4"]
    euler = chosen["euler-4"]
    assert {key: euler[key] for key in ("sampler", "steps", "rho", "sigma_max", "sigma_min", "distance")} == {
        "sampler": "euler",
        "steps": 4,
        "rho": 7.0,
        "sigma_max": 20.0,
        "sigma_min": 0.15,
        "distance": 2.0,
    }
    assert [row["distance"] for row in euler["table"]] == [3.0, 2.0, 2.0]
    rows = list(csv.DictReader(as_csv(distances).splitlines()))
    assert [row["solver"] for row in rows] == ["euler-4"] * 3 + ["2m-4"]
    assert rows[1] == {
        "solver": "euler-4",
        "sampler": "euler",
        "steps": "4",
        "evaluations": "4",
        "sigma_max": "20.0",
        "sigma_min": "0.15",
        "distance": "2.0",
    }


# --- what is measured


TARGET = Moments.of(torch.rand(40, 16, generator=torch.Generator().manual_seed(0)))


def flattened(images: Tensor) -> Tensor:
    """A stand-in for an extractor: 16 pixels of each image."""
    return images.flatten(1)[:, :16].float() / 255


def measured(params: TuneParams, card: ModelCard, denoise: Any, state: Path, world: World) -> dict[Candidate, float]:
    """The distances of all candidates to a made-up target, by the stand-in."""
    return measure_all(
        candidates(params, *RANGE),
        denoise,
        card,
        params,
        features=flattened,
        target=TARGET,
        labels=torch.arange(params.images) % 10,
        state=state,
        world=world,
    )


def test_a_distance_is_that_of_the_candidates_own_samples(tmp_path: Path, teacher: Path) -> None:
    """Sharing the first evaluation changes no bit: against each candidate sampled by itself."""
    params = tune_params(solvers=[{"sampler": name, "steps": 3} for name in ("euler", "heun", "2m", "renoise")])
    model, wanted = load_model(teacher), candidates(params, *RANGE)
    calls = torch.zeros(())

    def counting(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        calls.add_(len(x))
        return model.denoiser(x, sigma, condition)

    got = measured(params, model.card, counting, tmp_path, alone())
    evaluations = {"euler": 3, "heun": 5, "2m": 3, "renoise": 3}
    own = sum(evaluations[candidate.sampler] - 1 for candidate in wanted)
    assert int(calls) == 21 * (own + len(params.sigma_max))
    for candidate in wanted:
        parts = []
        for first in range(0, 21, 8):
            items = torch.arange(first, min(first + 8, 21))
            parts.append(
                sample_items(
                    model.denoiser,
                    sampler=SAMPLERS[candidate.sampler],
                    sigmas=karras(3, candidate.sigma_min, candidate.sigma_max),
                    condition=model.card.condition(items % 10),
                    seed=params.seed,
                    items=items,
                    shape=(1, 8, 8),
                    device=torch.device("cpu"),
                )
            )
        assert got[candidate] == frechet_distance(Moments.of(flattened(to_uint8(torch.cat(parts)))), TARGET)


def test_what_is_measured_is_not_measured_again(tmp_path: Path, teacher: Path) -> None:
    params = tune_params()
    model, world = load_model(teacher), alone()

    def measure(state: Path, denoise: Any, world: World) -> dict[Candidate, float]:
        return measured(params, model.card, denoise, state, world)

    started = []

    def stopping(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        started.append(float(sigma[0]))
        if len(started) == 11:  # in the second block of the third candidate
            world.stop.reason = "SIGTERM"
        return model.denoiser(x, sigma, condition)

    with pytest.raises(Stopped, match="stopped by SIGTERM after 2 of 8 candidates, all kept"):
        measure(tmp_path / "a", stopping, world)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    assert len(files) == 2
    resumed = measure(tmp_path / "a", model.denoiser, alone())
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert resumed == measure(tmp_path / "b", model.denoiser, alone())

    def never(x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        raise AssertionError("measured again")

    assert measure(tmp_path / "b", never, alone()) == resumed


def test_samples_that_are_not_finite_are_named(tmp_path: Path, digits_reference: Path) -> None:
    classes = open_reference(digits_reference).classes
    broken = make_model(tmp_path / "broken", classes=classes, broken=True).path
    with pytest.raises(SurroundingsError, match=r"euler-2-20\.0-0\.05: samples are not finite"):
        tune(tune_params(), name="t", model=broken, reference=digits_reference, output=tmp_path / "t", operation=CPU)


# --- the stage


def test_a_tuned_artefact_serves_sampling(
    tmp_path: Path, teacher: Path, digits_reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    moments = Reference.moments

    def watching(self: Reference, part: Any, name: str) -> Moments:
        asked.append((part, name))
        return moments(self, part, name)

    monkeypatch.setattr(Reference, "moments", watching)
    params, output = tune_params(), tmp_path / "tuned"
    artifact = tune(params, name="t", model=teacher, reference=digits_reference, output=output, operation=CPU)
    assert asked == [("validation", "classifier")]
    chosen = json.loads((output / "tuned.json").read_text())
    assert sorted(chosen) == ["euler-2", "renoise-2"]
    for key, entry in chosen.items():
        assert entry["distance"] == min(row["distance"] for row in entry["table"])
        assert len({row["distance"] for row in entry["table"]}) == 4
        assert artifact.manifest.summary[key] == entry["distance"]
    assert len((output / "tuned.csv").read_text().splitlines()) == 9
    assert set(artifact.manifest.inputs) == {"model", "reference"}
    run = RunParams(model="t", sampler="euler", steps=2, sigmas="tuned/t", images=3, micro_batch=4)
    sample(run, name="r", model=teacher, sigmas=output, output=tmp_path / "samples", operation=CPU)
    expected = karras(2, chosen["euler-2"]["sigma_min"], chosen["euler-2"]["sigma_max"])
    assert open_samples(tmp_path / "samples").index["sigmas"] == expected.tolist()


def test_stopped_and_gone_on_with_gives_the_same_bytes(
    tmp_path: Path,
    teacher: Path,
    digits_reference: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = tuning.write_atomic
    written: list[Path] = []

    def dying(path: Path, content: str | bytes) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        kept(path, content)

    def run(output: str) -> Any:
        return tune(
            tune_params(),
            name="t",
            model=teacher,
            reference=digits_reference,
            output=tmp_path / output,
            operation=CPU,
        )

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "write_atomic", dying)
        with pytest.raises(KeyboardInterrupt):
            run("a")
    assert not (tmp_path / "a").exists()
    resumed = run("a")
    assert "going on: 3 of " in capsys.readouterr().err
    assert [path.exists() for path in written] == [False] * 3  # the state went with the artefact
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "others"))
    whole = run("b")
    assert resumed.manifest.payload == whole.manifest.payload


def command(folder: Path, model: Path, reference: Path, **changes: Any) -> list[str]:
    entry = tune_params().plain() | changes
    solver = entry["solvers"][0]
    user = {"model": "teacher", "sigmas": "tuned/teacher", "images": 7} | solver
    params = write_params(
        folder / "params.yaml",
        **{
            "tune": {"teacher": entry},
            "sampling.runs": {"run": user},
            "reference.floor.counts": [7],
            "operation.device": "cpu",
        },
    )
    words = ["tune", "--name", "teacher", "--model", model, "--reference", reference]
    return [str(word) for word in [*words, "--output", folder / "tuned", "--params", params]]


def test_the_command_stops_at_its_deadline_and_goes_on(
    tmp_path: Path, teacher: Path, digits_reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"solvers": [{"sampler": "euler", "steps": 2}]}
    words = command(tmp_path, teacher, digits_reference, **one)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPESTILL_DEADLINE", "1")
        assert cli.main(words) == 75
    assert "stopped by its time limit after 0 of 4 candidates" in capsys.readouterr().err
    assert cli.main(words) == 0
    said = capsys.readouterr().err
    assert "teacher: 4 candidates of 21 images, by classifier" in said
    assert "going on" not in said
    assert cli.main(words) == 0
    assert "is there and verifies: nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solvers": [{"sampler": "euler", "steps": 2}], "sigma_max": [0.01]}, "make no range"),
        ({"solvers": [{"sampler": "native", "steps": 2}]}, "tune.teacher.solvers.0.sampler=native: "),
        ({"solvers": [{"sampler": "euler", "steps": 2}], "extractor": "inception"}, "was made without extractor"),
        ({"solvers": [{"sampler": "euler", "steps": 2}], "images": 0}, "images=0"),
    ],
)
def test_wrong_parameters_are_one_line_and_exit_2(
    tmp_path: Path,
    teacher: Path,
    digits_reference: Path,
    changes: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = cli.main(command(tmp_path, teacher, digits_reference, **changes))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pipestill tune:")]
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "tuned").exists()


def test_solvers_that_no_run_uses_are_tuned_by_hand(tmp_path: Path, teacher: Path, digits_reference: Path) -> None:
    words = command(tmp_path, teacher, digits_reference, solvers=[{"sampler": "euler", "steps": 2}])
    assert cli.main([*words, "tune.teacher.solvers=[{sampler: 2m, steps: 1}]", "tune.teacher.sigma_min=[0.05]"]) == 0
    assert list(json.loads((tmp_path / "tuned" / "tuned.json").read_text())) == ["2m-1"]


def test_a_model_of_other_images_is_refused(tmp_path: Path, digits_reference: Path) -> None:
    classes = open_reference(digits_reference).classes
    for name, what, says in (
        ("resolution", {"classes": classes, "resolution": 16}, "not for 16x16 with 1"),
        ("channels", {"classes": classes, "channels": 3}, "not for 8x8 with 3"),
        ("classes", {}, "10 classes, not for 8x8 with 1 and 3 or other ones: use the reference of this data"),
    ):
        model = make_model(tmp_path / name, **what).path  # type: ignore[arg-type]
        with pytest.raises(InputError, match=says):
            tune(tune_params(), name="t", model=model, reference=digits_reference, output=tmp_path / "t", operation=CPU)
