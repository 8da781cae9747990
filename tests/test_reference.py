"""The reference: what it holds against independent figures, its floors, ranks, outside statistics, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commands import payload, run, write_params
from evaluation_artifacts import make_dataset
from pipestill import artifacts
from pipestill.config import OperationParams, ReferenceParams
from pipestill.data.store import open_dataset
from pipestill.errors import InputError
from pipestill.evaluation import classifier, measure
from pipestill.evaluation.extractors import efficientnet_lite0
from pipestill.evaluation.intervals import mean_and_interval
from pipestill.evaluation.metrics import nearest
from pipestill.evaluation.moments import Moments, frechet_distance
from pipestill.evaluation.reference import Reference, open_reference
from pipestill.stages.reference import build_reference

CPU = OperationParams(device="cpu")
SMALL = {
    "classifier": {"channels": [8, 16], "features": 12, "iterations": 60, "batch": 32},
    "protocol": {"kid_subsets": 3, "kid_subset_size": 20},
    "floor": {"counts": [60, 30], "draws": 3},
    "batch": 50,
}


def params(**changes: Any) -> ReferenceParams:
    body: dict[str, Any] = {name: dict(value) if isinstance(value, dict) else value for name, value in SMALL.items()}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            body[section][key] = value
        else:
            body[section] = value
    return ReferenceParams(**body)


@pytest.fixture(autouse=True)
def _runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPESTILL_RUNS", str(folder / "runs"))
        build_reference(
            params(), dataset=dataset, output=folder / "reference", operation=CPU, metrics=folder / "floor.json"
        )
    return folder / "reference"


@pytest.fixture
def reference(built: Path) -> Reference:
    return open_reference(built)


# --- what it holds


def test_features_are_those_of_the_parts_images(reference: Reference, dataset: Path) -> None:
    data = open_dataset(dataset)
    for part in ("train", "validation", "test"):
        images = torch.from_numpy(data.images(data.split[part])).permute(0, 3, 1, 2)
        features = reference.features(part, "efficientnet_lite0")  # type: ignore[arg-type]
        torch.testing.assert_close(features, efficientnet_lite0()(images), rtol=1e-4, atol=1e-4)
        moments = reference.moments(part, "efficientnet_lite0")  # type: ignore[arg-type]
        assert moments.count == len(images)
        np.testing.assert_allclose(moments.covariance, np.cov(features.double().numpy(), rowvar=False), atol=1e-10)
        assert reference.labels(part).tolist() == data.labels[data.split[part]].tolist()  # type: ignore[arg-type]


def test_the_classifier_is_trained_on_the_train_part_alone(reference: Reference, dataset: Path) -> None:
    data = open_dataset(dataset)
    train = data.split["train"]
    alone = classifier.train(
        params().classifier,
        torch.from_numpy(data.images(train)).permute(0, 3, 1, 2),
        torch.from_numpy(data.labels[train]),
        len(data.classes),
    )
    kept = reference.classifier().state_dict()
    for name, tensor in alone.state_dict().items():
        assert torch.equal(kept[name], tensor)
    test = data.split["test"]
    images = torch.from_numpy(data.images(test)).permute(0, 3, 1, 2)
    right = reference.classify(images).argmax(1) == torch.from_numpy(data.labels[test])
    assert reference.index.accuracy["test"] == pytest.approx(float(right.double().mean()))
    assert reference.index.accuracy["test"] > 0.9
    torch.testing.assert_close(reference.extractor("classifier")(images), reference.features("test", "classifier"))


def test_floors_are_stratified_draws_of_train_against_test(reference: Reference) -> None:
    train, test = reference.features("train", "classifier"), reference.features("test", "classifier")
    for count in (60, 30):
        draws = [measure.drawn_rows(reference, count, "balanced", draw) for draw in range(3)]
        found = [frechet_distance(Moments.of(train[rows]), Moments.of(test)) for rows in draws]
        mean, interval = mean_and_interval(found)
        floor = reference.floor(count, "balanced")
        assert floor["fd_classifier"] == pytest.approx(mean, rel=1e-6)
        assert floor["intervals"]["fd_classifier"] == pytest.approx(interval, rel=1e-6)
        assert floor["images"] == count
    assert reference.floor(30, "balanced")["fd_classifier"] > reference.floor(60, "balanced")["fd_classifier"]


def test_real_images_are_as_far_from_train_as_real_images(reference: Reference) -> None:
    train, test = (reference.features(part, "efficientnet_lite0") for part in ("train", "test"))  # type: ignore[arg-type]
    assert reference.index.nearest_real == pytest.approx(float(nearest(test, train).median()))
    assert reference.floor(60, "balanced")["nearest_train_ratio"] == pytest.approx(1.0, abs=0.25)
    assert reference.floor(60, "balanced")["diversity"] == pytest.approx(1.0, abs=0.2)
    assert reference.floor(60, "balanced")["class_accuracy"] == reference.index.accuracy["test"]


def test_the_metrics_copy_has_a_runs_keys_and_every_count(built: Path, reference: Reference) -> None:
    copy = json.loads((built.parent / "floor.json").read_text())
    floor = reference.floor(60, "balanced")
    assert floor["fd_classifier"] == floor["floor_fd_classifier"]
    assert floor["excess_fd_efficientnet_lite0"] == 0
    assert copy["fd_classifier"] == float(f"{floor['fd_classifier']:.5g}")
    assert (copy["images"], copy["evaluations"], copy["seeds"]) == (60, 0, 3)
    assert [count["images"] for count in copy["counts"]] == [60, 30]
    assert copy["counts"][1]["fd_classifier"] == float(f"{reference.floor(30, 'balanced')['fd_classifier']:.5g}")
    measured = {key for key in floor if key.split("_")[0] in ("fd", "kid", "precision", "recall", "class", "diversity")}
    assert len(measured) == 10
    assert measured <= set(measure.texts_of(floor["protocol"]))


def test_a_count_or_space_or_part_that_is_not_there(reference: Reference) -> None:
    with pytest.raises(
        InputError,
        match=r"no real-against-real floor at 500 images of plan balanced \(it has balanced 60, balanced 30\)",
    ):
        reference.floor(500, "balanced")
    with pytest.raises(InputError, match="made without extractor inception"):
        reference.moments("test", "inception")


# --- the same bits


def test_again_and_over_ranks_it_is_the_same(built: Path, dataset: Path, tmp_path: Path) -> None:
    file = write_params(
        tmp_path / "params.yaml", **{"reference": SMALL, "sampling.runs": {}, "tune": {}, "operation.device": "cpu"}
    )
    arguments = ["reference", "--dataset", dataset, "--params", file]
    code, said = run(*arguments, "--output", tmp_path / "two", "--ranks", 2, runs=tmp_path / "runs-two")
    assert code == 0, said
    assert payload(tmp_path / "two") == payload(built)
    metrics = tmp_path / "floor.json"
    code, said = run(
        *arguments, "--output", tmp_path / "two", "--metrics", metrics, "--ranks", 2, runs=tmp_path / "runs-two"
    )
    assert code == 0, said
    assert said.count("nothing to do") == 1
    assert metrics.read_text() == (built.parent / "floor.json").read_text()


def test_it_goes_on_from_what_a_killed_attempt_left(
    built: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    def never(*arguments: object, **named: object) -> None:
        raise AssertionError("done again")

    output = tmp_path / "reference"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "floor", killed)
        with pytest.raises(KeyboardInterrupt):
            build_reference(params(), dataset=dataset, output=output, operation=CPU)
    assert not output.exists()
    monkeypatch.setattr(classifier.ClassifierTraining, "updates", never)
    monkeypatch.setattr("pipestill.evaluation.tables._write_rows", never)
    artifact = build_reference(params(), dataset=dataset, output=output, operation=CPU)
    assert artifact is not None
    assert artifact.manifest.payload == payload(built)


# --- without labels, in colour, outside statistics


def test_without_labels_there_is_no_classifier(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset", classes=(), channels=3, side=6)
    build_reference(
        params(protocol__extractors=["efficientnet_lite0"]),
        dataset=dataset,
        output=tmp_path / "reference",
        operation=CPU,
    )
    reference = open_reference(tmp_path / "reference")
    floor = reference.floor(60, "data")
    assert reference.classes == ()
    assert floor["notes"] == ["the data has no labels, so class mixes are unknown"]
    assert "fd_efficientnet_lite0" in floor
    assert not {"class_accuracy", "diversity", "fd_classifier"} & set(floor)
    with pytest.raises(InputError, match="has no classifier: its data has no labels"):
        reference.classifier()


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("few") / "dataset", 16, validation=0.2, test=0.4)


def inception_params(weights: Path, **changes: Any) -> ReferenceParams:
    return params(
        protocol={
            "extractors": ["inception"],
            "inception_weights": str(weights),
            "kid_subset_size": 3,
            "kid_subsets": 2,
            "neighbours": 2,
        },
        floor={"counts": [4], "draws": 1},
        **changes,
    )


def test_outside_statistics_stand_in_for_the_test_part(few: Path, inception_file: Path, tmp_path: Path) -> None:
    rng = np.random.RandomState(0)
    root = rng.randn(2048, 30) / 10
    np.savez(tmp_path / "stats.npz", mu=rng.randn(2048), sigma=root @ root.T)
    build_reference(
        inception_params(inception_file, statistics=str(tmp_path / "stats.npz")),
        dataset=few,
        output=tmp_path / "reference",
        operation=CPU,
    )
    reference = open_reference(tmp_path / "reference")
    with np.load(tmp_path / "stats.npz") as given:
        assert np.array_equal(reference.target("inception", None).mean, given["mu"])
        assert np.array_equal(reference.target("inception", None).covariance, given["sigma"])
    assert reference.moments("test", "inception").count == 6
    assert "the given statistics" in measure.texts_of(reference.floor(4, "balanced")["protocol"])["fd_inception"]
    assert reference.floor(4, "balanced")["inception_score"] >= 1

    # images instead of moments: their moments are reckoned; here, those of the test part itself
    data = open_dataset(few)
    np.savez(tmp_path / "images.npz", arr_0=data.images(data.split["test"]))
    from pipestill.evaluation.building import outside_moments

    moments = outside_moments(tmp_path / "images.npz", reference.extractor("inception"), batch=4)
    torch.testing.assert_close(moments.mean, reference.moments("test", "inception").mean)
    torch.testing.assert_close(moments.covariance, reference.moments("test", "inception").covariance)

    other = tmp_path / "other.pth"
    shutil.copyfile(inception_file, other)
    with other.open("ab") as file:
        file.write(b"0")
    changed = open_reference(tmp_path / "reference")
    object.__setattr__(changed.index, "protocol", changed.protocol.model_copy(update={"inception_weights": str(other)}))
    with pytest.raises(InputError, match=r"other\.pth is not the file that .* was made with"):
        changed.extractor("inception")


# --- bad input


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"floor__counts": [500]},
            r"500 images.*from 132 train images.*sampling\.shared\.images=132 or less",
        ),
        ({"protocol__kid_subset_size": 61}, r"kid_subset_size=61.* 2 to 30 fit"),
        ({"protocol__neighbours": 30}, r"neighbours=30.*at most 29 neighbours fit"),
        ({"protocol__extractors": ["inception"]}, r"no reference\.protocol\.inception_weights.*6726825d\.pth"),
        ({"statistics": "stats.npz"}, r"reference\.statistics holds Inception moments"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(dataset: Path, tmp_path: Path, changes: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        build_reference(params(**changes), dataset=dataset, output=tmp_path / "reference", operation=CPU)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "reference").exists()


def test_missing_statistics_are_named(dataset: Path, tmp_path: Path, inception_file: Path) -> None:
    wanted = params(
        protocol__extractors=["inception"], protocol__inception_weights=str(inception_file), statistics="absent.npz"
    )
    with pytest.raises(InputError, match=r"reference\.statistics=absent\.npz is not there"):
        build_reference(wanted, dataset=dataset, output=tmp_path / "reference", operation=CPU)


def test_unlabelled_data_refuses_the_classifier_extractor(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset", classes=())
    with pytest.raises(InputError, match=r"has no labels.*take classifier out of reference\.protocol\.extractors"):
        build_reference(params(), dataset=dataset, output=tmp_path / "reference", operation=CPU)


def test_data_without_a_test_part_is_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset", test=0.0)
    with pytest.raises(InputError, match=r"has 0 test images, at least 2 are needed: set data\.split"):
        build_reference(params(), dataset=dataset, output=tmp_path / "reference", operation=CPU)


def test_an_empty_validation_part_is_said_when_it_is_asked_for(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset", validation=0.0)
    build_reference(params(), dataset=dataset, output=tmp_path / "reference", operation=CPU)
    reference = open_reference(tmp_path / "reference")
    with pytest.raises(InputError, match=r"no validation images: set data\.split"):
        reference.moments("validation", "classifier")


def test_artefacts_of_another_kind_are_refused(built: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a reference artefact, a dataset was expected"):
        build_reference(params(), dataset=built, output=tmp_path / "reference", operation=CPU)
    with pytest.raises(InputError, match="is a dataset artefact, a reference was expected"):
        open_reference(dataset)


def test_an_index_of_another_version_is_refused_in_one_line(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "reference"
    shutil.copytree(built, copy)
    body = json.loads((copy / "reference.json").read_text())
    del body["resolution"]
    (copy / "reference.json").write_text(json.dumps(body))
    files = artifacts.describe_files(copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    renewed = artifacts.Manifest("reference", manifest["stage"], 1, {}, {}, files)
    (copy / "manifest.json").write_text(renewed.to_json())
    with pytest.raises(InputError, match=r"reference\.json cannot be read .*rebuild"):
        open_reference(copy)
