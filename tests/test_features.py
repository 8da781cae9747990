"""Runs with `store: features`: the figures of stored images, pictures for people, the same bytes over ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from commands import here, payload, run, write_params
from pipestill import cli
from pipestill.config import ReportParams
from pipestill.errors import InputError
from pipestill.sampling.store import open_samples
from tiny_models import make_model

DIGITS = tuple("0123456789")
COUNT = 20  # images at which the digits' reference has its floor
ENTRY = {"model": "teacher", "sampler": "euler", "steps": 2, "sigmas": "models/teacher", "seeds": [0, 5]}


def parameters(folder: Path, **changes: object) -> Path:
    entry = ENTRY | {"images": COUNT, "micro_batch": 8} | changes
    small = {"sampling.runs": {"run": entry}, "reference.floor.counts": [entry["images"]], "tune": {}}
    return write_params(folder / f"{len(list(folder.iterdir()))}.yaml", **small)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "teacher", classes=DIGITS).path


def sampled(folder: Path, name: str, model: Path, reference: Path, *more: object, **changes: object) -> Path:
    params = parameters(folder, **changes)
    places = ["--model", model, "--extractors", reference, "--output", folder / name, "--params", params, *more]
    command = ["sample", "--name", "run", *places]
    if "--ranks" in more:
        code, output = run(*command, runs=folder / "runs")
        assert code == 0, output
    else:
        here(*command, runs=folder / "runs")
    return folder / name


def figures(folder: Path, samples: Path, reference: Path) -> dict[str, object]:
    places = ["--samples", samples, "--reference", reference, "--output", folder / "figures"]
    here("evaluate", "--name", "run", *places, runs=folder / "runs")
    found: dict[str, object] = json.loads((folder / "figures" / "metrics.json").read_text())
    return found


FEATURES = {"store": "features", "extractors": "reference"}


def test_figures_are_those_of_stored_images(tmp_path: Path, model: Path, digits_reference: Path) -> None:
    images = sampled(tmp_path, "images", model, digits_reference)
    features = sampled(tmp_path, "features", model, digits_reference, **FEATURES)
    assert not list(features.glob("images-*.npy"))
    ours, theirs = figures(tmp_path, features, digits_reference), figures(tmp_path, images, digits_reference)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, float):
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        elif name != "intervals":
            assert ours[name] == value, name

    # people see the same pictures, of the first seed
    whole, kept = open_samples(images), open_samples(features)
    for item in range(COUNT):
        picture = kept.picture(item)
        assert picture is not None
        assert np.array_equal(picture, whole.images(item, item + 1)[0])
    assert kept.picture(COUNT) is None
    assert kept.spaces == ("classifier", "efficientnet_lite0")
    with pytest.raises(InputError, match="holds features, not images"):
        kept.images(0, 1)


def test_any_number_of_ranks_gives_the_same_bytes(tmp_path: Path, model: Path, digits_reference: Path) -> None:
    one = sampled(tmp_path, "one", model, digits_reference, **FEATURES)
    two = sampled(tmp_path, "two", model, digits_reference, "--ranks", 2, **FEATURES)
    assert payload(one) == payload(two)


def test_many_classes_keep_what_a_report_shows() -> None:
    from pipestill.sampling.pictures import pick_classes, pick_items
    from pipestill.sampling.store import kept_items

    labels, report = np.arange(50_000) % 1000, ReportParams()
    kept = kept_items(labels, range(1000))
    assert len(kept) == 100
    assert set(kept) == set(pick_items(labels, pick_classes(range(1000), report.grid_rows), report.grid_columns, 10))
    assert kept_items(np.full(50_000, 5), range(1000)) == list(
        range(100)
    )  # a run of one class that a report does not show
    assert kept_items(np.arange(7), range(1000)) == list(range(7))


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused; returns its line."""
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))

    def call(*command: object) -> str:
        assert cli.main([str(word) for word in command]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    return call


def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, model: Path, digits_reference: Path, refused: Callable[..., str]
) -> None:
    features = parameters(tmp_path, **FEATURES)
    sampling = ["sample", "--name", "run", "--model", model, "--output", tmp_path / "samples", "--params"]
    assert "give --extractors, and no --png" in refused(*sampling, features)
    assert "give --extractors, and no --png" in refused(
        *sampling, features, "--extractors", digits_reference, "--png", tmp_path / "png"
    )
    assert "belong together" in refused(*sampling, parameters(tmp_path, store="features"))
    other = make_model(tmp_path / "other").path
    sampling[4] = other
    assert "use the reference of this data" in refused(*sampling, features, "--extractors", digits_reference)
    assert not (tmp_path / "samples").exists()


def test_a_floor_is_needed_to_evaluate_and_not_to_sample(
    tmp_path: Path, model: Path, digits_reference: Path, refused: Callable[..., str]
) -> None:
    samples = sampled(tmp_path, "few", model, digits_reference, images=5, **FEATURES)
    assert open_samples(samples).images_per_seed == 5
    measuring = ["evaluate", "--name", "run", "--samples", samples, "--output", tmp_path / "figures"]
    assert "has no real-against-real floor at 5 images" in refused(*measuring, "--reference", digits_reference)


def test_features_are_tied_to_extractors_and_not_to_floors(
    tmp_path: Path, model: Path, digits: Path, digits_reference: Path, refused: Callable[..., str]
) -> None:
    samples = sampled(tmp_path, "measured", model, digits_reference, **FEATURES)
    measuring = ["evaluate", "--name", "run", "--samples", samples, "--output", tmp_path / "figures"]
    for name, iterations in (("floors", 30), ("judge", 3)):  # as the fixture's, or another classifier
        params = write_params(
            tmp_path / f"{name}.yaml",
            **{
                "reference.floor": {"counts": [COUNT, 30], "draws": 2},
                "reference.protocol": {"kid_subsets": 3, "kid_subset_size": 20},
                "reference.classifier": {"channels": [8], "features": 8, "iterations": iterations},
                "sampling.runs": {},
                "tune": {},
            },
        )
        made = ["reference", "--dataset", digits, "--output", tmp_path / name, "--params", params]
        here(*made, runs=tmp_path / "runs")
    here(*measuring, "--reference", tmp_path / "floors", runs=tmp_path / "runs")
    assert "features by other extractors" in refused(*measuring, "--reference", tmp_path / "judge")
