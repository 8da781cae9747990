"""Evaluation: agreement with torch-fidelity, what faults do to the figures, seeds, ranks, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from commands import payload, run, write_params
from evaluation_artifacts import CLASSES, drawn, make_dataset, make_samples
from pipestill.config import EvaluationParams, OperationParams, ReferenceParams
from pipestill.data.store import open_dataset
from pipestill.errors import InputError
from pipestill.evaluation import measure
from pipestill.evaluation.intervals import mean_and_interval
from pipestill.evaluation.reference import open_reference
from pipestill.stages.evaluate import evaluate
from pipestill.stages.reference import build_reference
from pipestill.work import write_atomic

CPU = OperationParams(device="cpu")
COUNT = 90
REFERENCE = {
    "classifier": {"channels": [8, 16], "features": 12, "iterations": 60, "batch": 32},
    "protocol": {"kid_subsets": 5, "kid_subset_size": 40},
    "floor": {"counts": [COUNT], "draws": 3},
}


@pytest.fixture(autouse=True)
def _runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset", 300)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPESTILL_RUNS", str(folder / "runs"))
        build_reference(ReferenceParams(**REFERENCE), dataset=dataset, output=folder / "reference", operation=CPU)
    return folder / "reference"


def measured(
    tmp_path: Path, reference: Path, images: NDArray[np.uint8], labels: NDArray[np.int64], **index: Any
) -> dict[str, Any]:
    make_samples(tmp_path / "samples", images, labels, **index)
    artifact = evaluate(
        EvaluationParams(batch=32),
        name="run",
        samples=tmp_path / "samples",
        reference=reference,
        output=tmp_path / "evaluation",
        operation=CPU,
    )
    assert artifact is not None
    found: dict[str, Any] = json.loads(artifact.file("metrics.json").read_text())
    return found


# --- agreement


class Pictures(TorchDataset[Tensor]):
    """Images [n, H, W, C] as torch-fidelity wants them: bare uint8 CHW tensors."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self._images = torch.from_numpy(images).permute(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images[index]


def test_it_agrees_with_torch_fidelity_to_five_digits(tmp_path: Path, reference: Path, dataset: Path) -> None:
    import torch_fidelity

    from pipestill.evaluation import fidelity
    from pipestill.evaluation.extractors import efficientnet_lite0

    images, labels = drawn(COUNT, seed=5)
    ours = measured(tmp_path, reference, images, labels)
    data, protocol = open_dataset(dataset), open_reference(reference).protocol
    name = fidelity.register("pipestill-efficientnet-lite0", efficientnet_lite0, torch.float64)
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(images),
        input2=Pictures(data.images(data.split["test"])),
        feature_extractor=name,
        fid=True,
        kid=True,
        prc=True,
        kid_subsets=protocol.kid_subsets,
        kid_subset_size=protocol.kid_subset_size,
        rng_seed=protocol.seed,
        prc_neighborhood=protocol.neighbours,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert ours["fd_efficientnet_lite0"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert ours["kid_efficientnet_lite0"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    assert ours["precision_efficientnet_lite0"] == pytest.approx(theirs["precision"], rel=1e-5)
    assert ours["recall_efficientnet_lite0"] == pytest.approx(theirs["recall"], rel=1e-5)


def test_the_distance_agrees_with_torch_fidelity_in_single_precision_too(
    tmp_path: Path, reference: Path, dataset: Path
) -> None:
    import torch_fidelity

    from pipestill.evaluation import fidelity
    from pipestill.evaluation.extractors import efficientnet_lite0

    images, labels = drawn(COUNT, seed=6)
    ours = measured(tmp_path, reference, images, labels)
    data = open_dataset(dataset)
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(images),
        input2=Pictures(data.images(data.split["test"])),
        feature_extractor=fidelity.register("pipestill-efficientnet-lite0-float32", efficientnet_lite0),
        fid=True,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert ours["fd_efficientnet_lite0"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)


# --- what faults do


def test_fresh_images_of_the_same_kind_are_near_the_floor(tmp_path: Path, reference: Path) -> None:
    images, labels = drawn(COUNT, seed=7)
    found = measured(tmp_path, reference, images, labels)
    floor = open_reference(reference).floor(COUNT, "balanced")
    for space in ("classifier", "efficientnet_lite0"):
        assert found[f"fd_{space}"] == pytest.approx(floor[f"fd_{space}"], rel=0.5)
        assert found[f"floor_fd_{space}"] == floor[f"fd_{space}"]
        assert found[f"excess_fd_{space}"] == pytest.approx(found[f"fd_{space}"] - floor[f"fd_{space}"], abs=1e-6)
        assert found[f"precision_{space}"] > 0.8
        assert found[f"recall_{space}"] > 0.8
    assert found["class_accuracy"] > 0.9
    assert found["diversity"] == pytest.approx(1.0, abs=0.15)
    assert found["nearest_train_ratio"] == pytest.approx(1.0, abs=0.15)
    assert (found["evaluations"], found["guidance"], found["images"], found["seeds"]) == (20, 1.5, COUNT, 1)
    assert found["intervals"] == {}
    protocol = measure.texts_of(found["protocol"])
    assert all(isinstance(text, str) and text for text in protocol.values())
    assert f"draws of {COUNT} train images" in protocol["floor"]
    assert "seconds_per_image" not in found


def test_a_collapse_within_classes_is_seen(tmp_path: Path, reference: Path) -> None:
    images, labels = drawn(len(CLASSES), seed=7)
    found = measured(tmp_path, reference, np.tile(images, (30, 1, 1, 1)), np.tile(labels, 30))
    assert found["diversity"] < 1e-6
    assert found["class_accuracy"] == 1.0
    assert found["recall_classifier"] < 0.1
    assert found["excess_fd_classifier"] > found["floor_fd_classifier"]


def test_images_of_the_wrong_class_cost_accuracy_alone(tmp_path: Path, reference: Path) -> None:
    images, labels = drawn(COUNT, seed=7)
    found = measured(tmp_path, reference, images, (labels + 1) % len(CLASSES))
    assert found["class_accuracy"] < 0.1
    assert found["precision_efficientnet_lite0"] > 0.8


def test_copies_of_training_images_are_seen(tmp_path: Path, reference: Path, dataset: Path) -> None:
    data = open_dataset(dataset)
    copies = data.split["train"][:COUNT]
    found = measured(tmp_path, reference, data.images(copies), data.labels[copies])
    assert found["nearest_train_ratio"] < 1e-3
    assert found["precision_efficientnet_lite0"] > 0.8


def test_noise_costs_precision_in_the_efficientnet_space(tmp_path: Path, reference: Path) -> None:
    images, labels = drawn(COUNT, seed=7)
    noise = np.random.RandomState(0).randn(*images.shape) * 40
    found = measured(tmp_path, reference, np.clip(images + noise, 0, 255).astype(np.uint8), labels)
    assert found["precision_efficientnet_lite0"] < 0.5
    assert found["excess_fd_efficientnet_lite0"] > 3 * found["floor_fd_efficientnet_lite0"]
    assert found["nearest_train_ratio"] > 1.2


def test_images_without_a_class_have_no_accuracy(tmp_path: Path, reference: Path) -> None:
    images, labels = drawn(COUNT, seed=7)
    found = measured(tmp_path, reference, images, np.full_like(labels, -1), classes=CLASSES)
    assert not {"class_accuracy", "diversity"} & set(found)
    assert found["fd_classifier"] > 0


# --- seeds, ranks, timings


def test_several_seeds_give_means_and_intervals(tmp_path: Path, reference: Path) -> None:
    parts = [drawn(COUNT, seed=seed) for seed in (11, 12, 13)]
    images, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    together = measured(tmp_path, reference, images, labels, seeds=(11, 12, 13))
    single = []
    for index, (images, labels) in enumerate(parts):
        (tmp_path / str(index)).mkdir()
        single.append(measured(tmp_path / str(index), reference, images, labels))
    assert (together["images"], together["seeds"]) == (3 * COUNT, 3)
    for key in ("fd_classifier", "kid_efficientnet_lite0", "recall_classifier", "class_accuracy", "diversity"):
        mean, interval = mean_and_interval([found[key] for found in single])
        assert together[key] == pytest.approx(mean, rel=1e-5)
        assert together["intervals"][key] == pytest.approx(interval, rel=1e-4)
    assert together["floor_fd_classifier"] == single[0]["floor_fd_classifier"]
    assert "sampling seeds" in measure.texts_of(together["protocol"])["intervals"]
    by_seed = json.loads((tmp_path / "evaluation" / "seeds.json").read_text())
    assert list(by_seed) == ["11", "12", "13"]
    assert by_seed["12"]["fd_classifier"] == pytest.approx(single[1]["fd_classifier"], rel=1e-6)


def test_ranks_do_not_change_a_bit_and_timings_stay_outside(tmp_path: Path, reference: Path) -> None:
    images, labels = drawn(COUNT, seed=7)
    artifact = make_samples(tmp_path / "samples", images, labels)
    record = tmp_path / "runs" / "sample" / artifact.manifest.key[:16] / "record.json"
    write_atomic(record, json.dumps({"finished": True, "seconds_per_image": 0.125}))
    file = write_params(
        tmp_path / "params.yaml",
        **{"evaluation": {"batch": 16}, "operation.device": "cpu", "sampling.runs": {}, "tune": {}},
    )
    metrics = tmp_path / "metrics" / "run.json"
    digests = []
    for ranks in (1, 3):
        output = tmp_path / f"evaluation-{ranks}"
        arguments = ["evaluate", "--name", "run", "--samples", tmp_path / "samples", "--reference", reference]
        arguments += ["--output", output, "--metrics", metrics, "--params", file, "--ranks", ranks]
        code, said = run(*arguments, runs=tmp_path / "runs")
        assert code == 0, said
        digests.append(payload(output))
    assert digests[0] == digests[1]
    inside = json.loads((output / "metrics.json").read_text())
    kept = {"class_accuracy", "diversity", "evaluations", "fd_classifier", "fd_efficientnet_lite0", "guidance"}
    found = json.loads(metrics.read_text())
    assert found.pop("mix") == ["balanced"]
    assert set(found) == kept | {"images", "seeds"}
    assert found["fd_classifier"] == float(f"{inside['fd_classifier']:.5g}")
    assert found == pytest.approx({key: inside[key] for key in found}, rel=1e-4)

    before = metrics.read_bytes()
    metrics.unlink()
    code, said = run(*arguments, runs=tmp_path / "runs")
    assert code == 0, said
    assert "nothing to do" in said
    assert metrics.read_bytes() == before


# --- bad input


def refused(tmp_path: Path, reference: Path, said: str, images: NDArray[np.uint8], **index: Any) -> None:
    labels = np.arange(len(images)) % len(CLASSES)
    with pytest.raises(InputError, match=said) as raised:
        measured(tmp_path, reference, images, labels.astype(np.int64), **index)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "evaluation").exists()


def test_another_resolution_or_colour_is_refused(tmp_path: Path, reference: Path) -> None:
    (tmp_path / "a").mkdir()
    refused(tmp_path / "a", reference, "holds 16x16 images with 1 channels.*8x8 with 1", drawn(COUNT, side=16)[0])
    (tmp_path / "b").mkdir()
    refused(tmp_path / "b", reference, "holds 8x8 images with 3 channels.*8x8 with 1", drawn(COUNT, channels=3)[0])


def test_other_classes_are_refused(tmp_path: Path, reference: Path) -> None:
    refused(tmp_path, reference, "has 3 classes, .* has 3 or other names", drawn(COUNT)[0], classes=("a", "b", "c"))


def test_a_count_without_a_floor_is_refused(tmp_path: Path, reference: Path) -> None:
    refused(
        tmp_path,
        reference,
        r"no real-against-real floor at 60 images of plan balanced \(it has balanced 90\)",
        drawn(60)[0],
    )


def test_artefacts_of_another_kind_are_refused(tmp_path: Path, reference: Path, dataset: Path) -> None:
    images, labels = drawn(COUNT)
    make_samples(tmp_path / "samples", images, labels)
    for samples, against, said in (
        (dataset, reference, "is a dataset artefact, a samples was expected"),
        (tmp_path / "samples", dataset, "is a dataset artefact, a reference was expected"),
        (tmp_path / "absent", reference, "absent does not exist"),
    ):
        with pytest.raises(InputError, match=said):
            evaluate(
                EvaluationParams(),
                name="run",
                samples=samples,
                reference=against,
                output=tmp_path / "evaluation",
                operation=CPU,
            )
