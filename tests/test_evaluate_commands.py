"""`pipestill reference` and `pipestill evaluate` on the digits: exit codes, one line each, and what stays untouched."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from commands import write_params
from evaluation_artifacts import make_dataset, make_samples
from pipestill import cli
from pipestill.data.store import open_dataset
from pipestill.evaluation.extractors import efficientnet_lite0
from pipestill.evaluation.metrics import kid, precision_recall
from pipestill.evaluation.moments import Moments, frechet_distance
from pipestill.evaluation.reference import open_reference

COUNT = 20  # images at which the digits' reference has its floor
Said = Callable[..., tuple[int, str]]
Sampled = tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...]]


@pytest.fixture(autouse=True)
def _runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs a command with small parameters; returns its exit code and what it wrote to stderr."""
    small = {
        "operation.device": "cpu",
        "sampling.runs": {},
        "tune": {},
        "reference.floor": {"counts": [30], "draws": 2},
        "reference.classifier.iterations": 5,
        "reference.protocol.kid_subsets": 2,
        "reference.protocol.kid_subset_size": 20,
    }
    params = write_params(tmp_path / "params.yaml", **small)

    def run(*words: object) -> tuple[int, str]:
        code = cli.main([*map(str, words), "--params", str(params)])
        return code, capsys.readouterr().err

    return run


def refused(outcome: tuple[int, str], *said: str) -> None:
    """Exit code 2 and, last and once, a line that says each of these."""
    code, error = outcome
    assert code == 2, error
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("pipestill ")]
    assert error.splitlines()[-1:] == lines
    for words in said:
        assert words in lines[0]


def contents(*places: Path) -> dict[Path, bytes]:
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file()]
    return {file: file.read_bytes() for file in files}


@pytest.fixture
def sampled(digits: Path) -> Sampled:
    """Noisy digits, two of each class, with their class names."""
    data, rng = open_dataset(digits), np.random.RandomState(0)
    chosen = np.array([rng.choice(np.nonzero(data.labels == number % 10)[0]) for number in range(COUNT)])
    noisy = data.images(chosen) + 20 * rng.randn(COUNT, 8, 8, 1)
    return np.clip(noisy, 0, 255).astype(np.uint8), data.labels[chosen], tuple(data.classes)


def test_evaluate_refuses_what_does_not_fit_and_touches_nothing(
    tmp_path: Path, call: Said, sampled: Sampled, digits: Path, digits_reference: Path
) -> None:
    images, labels, names = sampled
    output, copy = tmp_path / "evaluation", tmp_path / "run.json"

    def attempt(samples: Path, *more: object, reference: Path = digits_reference) -> tuple[int, str]:
        words = ["evaluate", "--name", "run", "--samples", samples, "--reference", reference, "--output", output]
        return call(*words, "--metrics", copy, *more)

    good = make_samples(tmp_path / "good", images, labels, classes=names).path
    assert attempt(good)[0] == 0
    before = contents(output, copy)
    wide = make_samples(tmp_path / "wide", images.repeat(2, axis=2), labels, classes=names).path
    refused(attempt(wide), str(wide), "8x16", "8x8", "use the reference of this data")
    colour = make_samples(tmp_path / "colour", images.repeat(3, axis=3), labels, classes=names).path
    refused(attempt(colour), str(colour), "3 channels", "8x8 with 1")
    other = make_samples(tmp_path / "other", images, labels % 3, classes=("a", "b", "c")).path
    refused(attempt(other), str(other), "has 3 classes", "has 10")
    few = make_samples(tmp_path / "few", images[:15], labels[:15], classes=names).path
    refused(
        attempt(few),
        "no real-against-real floor at 15 images of plan balanced (it has balanced 20)",
        "reference.floor.counts",
    )
    refused(attempt(digits), f"{digits} is a dataset artefact")
    refused(attempt(good, reference=good), f"{good} is a samples artefact")
    refused(attempt(tmp_path / "absent"), f"{tmp_path / 'absent'} does not exist")
    refused(attempt(good, "evaluation.batch=0"), "evaluation.batch")
    refused(attempt(good, "evaluation.bach=9"), "evaluation.bach")
    assert contents(output, copy) == before
    assert not list(tmp_path.glob(".*partial"))


def test_reference_refuses_what_does_not_fit_and_touches_nothing(
    tmp_path: Path, call: Said, inception_file: Path
) -> None:
    dataset, output, copy = make_dataset(tmp_path / "dataset", 120), tmp_path / "reference", tmp_path / "floor.json"

    def attempt(*more: str, dataset: Path = dataset) -> tuple[int, str]:
        return call("reference", "--dataset", dataset, "--output", output, "--metrics", copy, *more)

    assert attempt()[0] == 0
    before = contents(output, copy)
    wanted = "reference.protocol.extractors=[classifier,inception]"
    refused(attempt(wanted), "no reference.protocol.inception_weights", "weights-inception-2015-12-05-6726825d.pth")
    refused(attempt(wanted, "reference.protocol.inception_weights=absent.pth"), "absent.pth is not there")
    weights = f"reference.protocol.inception_weights={inception_file}"
    refused(attempt(wanted, weights, "reference.statistics=absent.npz"), "absent.npz is not there")
    refused(attempt("reference.statistics=absent.npz"), "add inception to reference.protocol.extractors")
    refused(attempt("reference.floor.counts=[67]"), "runs have 67 images", "from 66 train images")
    refused(attempt("reference.floor.counts=[]"), "reference.floor.counts is empty")
    refused(attempt("reference.protocol.kid_subset_size=31"), "kid_subset_size=31", "2 to 30 fit")
    refused(attempt("reference.protocol.neighbours=30"), "neighbours=30", "at most 29")
    both = ("reference.protocol.kid_subset_size=31", "reference.protocol.neighbours=30")
    refused(attempt(*both), "kid_subset_size=31", "neighbours=30")  # everything at once
    refused(attempt(dataset=output), f"would replace {output}, an input of this command")
    unlabelled = make_dataset(tmp_path / "unlabelled", 120, classes=())
    refused(attempt(dataset=unlabelled), str(unlabelled), "no labels", "take classifier out of")
    assert contents(output, copy) == before
    assert not list(tmp_path.glob(".*partial"))


def test_a_distance_to_an_edm_files_moments(tmp_path: Path, inception_file: Path, call: Said) -> None:
    """From the command's figures: the distance to mu and sigma of an npz, against the cross-Gram matrix's norm."""
    from pipestill.evaluation.extractors import inception

    data = open_dataset(make_dataset(tmp_path / "dataset", 12, validation=0, test=0.4))
    images, labels = data.images(np.arange(6)), data.labels[:6]
    features = inception(weights=str(inception_file))(torch.from_numpy(data.images(np.arange(12))).permute(0, 3, 1, 2))
    outside = features[6:] * 1.5 + 0.25
    np.savez(
        tmp_path / "edm.npz",
        mu=outside.double().numpy().mean(0),
        sigma=np.cov(outside.double().numpy(), rowvar=False),
    )
    small = ["reference.protocol.extractors=[inception]", f"reference.protocol.inception_weights={inception_file}"]
    small += [f"reference.statistics={tmp_path / 'edm.npz'}", "reference.floor.counts=[6]", "reference.floor.draws=1"]
    small += ["reference.protocol.kid_subset_size=3", "reference.batch=12"]
    place = tmp_path / "reference"
    code, error = call("reference", "--dataset", tmp_path / "dataset", "--output", place, *small)
    assert code == 0, error
    samples = make_samples(tmp_path / "samples", images, labels).path
    words = ["evaluate", "--name", "run", "--samples", samples, "--reference", place, "--output", tmp_path / "found"]
    code, error = call(*words, *small)
    assert code == 0, error
    found = json.loads((tmp_path / "found" / "metrics.json").read_text())

    x, y = (table.double() - table.double().mean(0) for table in (features[:6], outside))
    x, y = x / math.sqrt(len(x) - 1), y / math.sqrt(len(y) - 1)
    away = (features[:6].double().mean(0) - outside.double().mean(0)).square().sum()
    expected = away + x.square().sum() + y.square().sum() - 2 * torch.linalg.matrix_norm(x @ y.T, ord="nuc")
    assert found["fd_inception"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_colour_images_agree_with_torch_fidelity(dtype: torch.dtype) -> None:
    """Colour at 16x16 in both precisions in which torch-fidelity may get the features; its float32 kernel sums lose
    digits of KID to cancellation."""
    import torch_fidelity

    from pipestill.evaluation.fidelity import register

    rng = np.random.RandomState(1)
    waves = 128 + 60 * np.sin(np.arange(16) * rng.rand(260, 3, 1, 1) * 2) + 30 * rng.randn(260, 3, 16, 16)
    waves[:120] += 20
    images = torch.from_numpy(np.clip(waves, 0, 255).astype(np.uint8))
    generated, real = images[:120], images[120:]
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(generated),
        input2=Pictures(real),
        feature_extractor=register(f"colour-{dtype}".replace(".", "-"), efficientnet_lite0, dtype),
        fid=True,
        kid=True,
        prc=True,
        kid_subsets=5,
        kid_subset_size=60,
        prc_neighborhood=3,
        rng_seed=11,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    ours, against = efficientnet_lite0()(generated), efficientnet_lite0()(real)
    distance = frechet_distance(Moments.of(ours), Moments.of(against))
    assert distance == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    tolerance = 1e-5 if dtype == torch.float64 else 1e-3
    found = kid(ours, against, subsets=5, size=60, seed=11)
    assert found == pytest.approx(theirs["kernel_inception_distance_mean"], rel=tolerance)
    assert precision_recall(ours, against, neighbours=3) == pytest.approx((theirs["precision"], theirs["recall"]))


class Pictures(torch.utils.data.Dataset[torch.Tensor]):
    """uint8 images [n, C, H, W] one by one."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def test_the_digits_floor_falls_with_the_number_of_images(digits_reference: Path) -> None:
    from pipestill.evaluation.measure import floor

    reference = open_reference(digits_reference)
    few, many = floor(reference, 40, 2, "balanced"), floor(reference, 400, 2, "balanced")
    for space in ("classifier", "efficientnet_lite0"):
        assert many[f"fd_{space}"] < 0.5 * few[f"fd_{space}"]


def test_the_floors_copy_leads_with_the_first_count_given(tmp_path: Path, call: Said) -> None:
    dataset, copy = make_dataset(tmp_path / "dataset", 240), tmp_path / "floor.json"
    words = ["reference", "--dataset", dataset, "--output", tmp_path / "reference", "--metrics", copy]
    code, error = call(*words, "reference.floor.counts=[40,100]")  # "100" comes before "40" as a string
    assert code == 0, error
    found = json.loads(copy.read_text())
    assert (found["images"], [floor["images"] for floor in found["counts"]]) == (40, [40, 100])
    few, many = (floor["fd_classifier"] for floor in found["counts"])
    assert found["fd_classifier"] == few > many
