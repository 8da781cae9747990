"""Runs, floors, tuning and validation are compared with images of their own class mix."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation_artifacts import CLASSES, drawn, make_samples, publish_dataset
from pipestill import mixes
from pipestill.config import (
    ClassifierParams,
    EvaluationParams,
    FloorParams,
    GanParams,
    OperationParams,
    ProtocolParams,
    ReferenceParams,
    SolverParams,
    StudentParams,
    TuneParams,
    ValidationParams,
)
from pipestill.diffusion.conditions import ClassCondition
from pipestill.distillation import validation
from pipestill.distributed import World
from pipestill.evaluation import measure
from pipestill.evaluation.limits import misfits
from pipestill.evaluation.matching import _resamples, match
from pipestill.evaluation.moments import Moments, frechet_distance
from pipestill.evaluation.reference import NEAREST, Reference, open_reference
from pipestill.sampling import items, tuning
from pipestill.sampling.store import open_samples
from pipestill.stages.distill import prepared
from pipestill.stages.evaluate import evaluate
from pipestill.stages.reference import build_reference
from pipestill.stages.tune import tune
from tiny_models import make_model

CPU = OperationParams(device="cpu")
TRAIN, TEST = (60, 20, 20), (90, 30, 15)  # images per class
SPACE = "classifier"
COUNT = 45


def with_protocol(reference: Reference, **changes: Any) -> Reference:
    """The same reference under another protocol."""
    protocol = reference.protocol.model_copy(update=changes)
    return Reference(reference.folder, dataclasses.replace(reference.index, protocol=protocol))


def images(*counts: int, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Waves with so many of each class."""
    pixels, labels = drawn(3 * max(counts), seed=seed)
    rows = np.concatenate([np.flatnonzero(labels == index)[:count] for index, count in enumerate(counts)])
    return pixels[rows], labels[rows]


def reference_of(folder: Path, train: tuple[int, ...], test: tuple[int, ...], **changes: Any) -> Reference:
    sets = [images(*train), images(*train, seed=1), images(*test, seed=2)]
    parts = np.repeat(np.arange(3), [len(labels) for _, labels in sets]).astype(np.uint8)
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*sets, strict=True))
    dataset = publish_dataset(folder / "dataset", pixels, labels, parts, CLASSES)
    params = ReferenceParams(
        protocol=ProtocolParams(extractors=(SPACE,), kid_subsets=4, kid_subset_size=20),
        classifier=ClassifierParams(channels=(8,), features=8, iterations=20),
        **{"floor": FloorParams(counts=(COUNT,), plans=("balanced", "data"), draws=2)} | changes,
    )
    build_reference(params, dataset=dataset, output=folder / "reference", operation=CPU)
    return open_reference(folder / "reference")


@pytest.fixture(scope="module")
def unbalanced(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("unbalanced")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPESTILL_RUNS", str(folder / "runs"))
        return reference_of(folder, TRAIN, TEST)


@pytest.fixture(autouse=True)
def _runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPESTILL_RUNS", str(tmp_path / "runs"))


def evaluated(folder: Path, reference: Reference, labels: NDArray[np.int64], plan: str) -> dict[str, Any]:
    """metrics.json of real test-like images with these labels, sampled by a plan."""
    pool, found = images(60, 60, 60, seed=7)
    rows = np.concatenate([np.flatnonzero(found == index)[: (labels == index).sum()] for index in range(3)])
    make_samples(folder / "samples", pool[rows], found[rows], plan=plan)
    evaluate(
        EvaluationParams(),
        name="run",
        samples=folder / "samples",
        reference=reference.folder,
        output=folder / "evaluation",
        operation=CPU,
    )
    body: dict[str, Any] = json.loads((folder / "evaluation" / "metrics.json").read_text())
    return body


def test_equal_weights_give_the_plain_moments_and_others_those_of_repeated_rows() -> None:
    table = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    plain = Moments.of(table)
    weighted = Moments.weighted(table, torch.full((60,), 1 / 60, dtype=torch.float64))
    assert torch.allclose(weighted.mean, plain.mean, rtol=0, atol=1e-12)
    assert torch.allclose(weighted.covariance, plain.covariance, rtol=0, atol=1e-12)
    weights = torch.cat([torch.full((20,), 2.0), torch.ones(40)]).double() / 80
    repeated = torch.cat([table[:20], table]).double()
    mean = repeated.mean(0)
    assert torch.allclose(Moments.weighted(table, weights).mean, mean, rtol=0, atol=1e-12)
    centred = repeated - mean
    expected = centred.T @ centred / 80 / (1 - float((weights**2).sum()))
    assert torch.allclose(Moments.weighted(table, weights).covariance, expected, rtol=0, atol=1e-12)


def test_a_part_that_is_in_the_mix_is_taken_as_it_is(tmp_path: Path) -> None:
    reference = reference_of(tmp_path, (30, 30, 30), (20, 21, 20))
    for plan in ("balanced", "drawn", "data"):
        found = match(reference, plan)
        assert (found.weights, found.subsets, found.resamples, found.notes) == (None, None, None, ())
    assert reference.target(SPACE, None) is reference.moments("test", SPACE)
    floors = [reference.floor(COUNT, "balanced"), reference.floor(COUNT, "data")]
    assert floors[0] | {"mix": ["data"]} == floors[1]


def test_the_test_part_is_weighted_and_resampled_into_the_mix_of_the_run(unbalanced: Reference) -> None:
    labels = unbalanced.labels("test")
    for plan, shares in (("balanced", [1 / 3] * 3), ("data", [0.6, 0.2, 0.2])):
        found = match(unbalanced, plan)
        assert found.weights is not None
        assert found.subsets is not None
        assert found.resamples is not None
        assert [float(found.weights[labels == index].sum()) for index in range(3)] == pytest.approx(shares)
        assert all(len(rows) == len(rows.unique()) == 20 for rows in found.subsets)
        many = match(with_protocol(unbalanced, kid_subsets=400), plan).subsets
        assert many is not None
        drawn_labels = torch.cat([labels[rows] for rows in many])
        # the part's own mix, [5333, 1778, 889] of 8000, is far from either
        assert torch.bincount(drawn_labels).tolist() == pytest.approx([8000 * share for share in shares], abs=200)
        for rows in found.resamples:
            assert torch.bincount(labels[rows]).tolist() == [
                round(share * 75) if plan == "data" else 15 for share in shares
            ]
        table = unbalanced.features("test", SPACE)
        mean = sum(share * table[labels == index].double().mean(0) for index, share in enumerate(shares))
        assert torch.allclose(unbalanced.target(SPACE, found.weights).mean, mean, rtol=0, atol=1e-9)  # type: ignore[arg-type]


def test_a_floor_is_drawn_in_the_mix_of_the_run(unbalanced: Reference) -> None:
    labels = unbalanced.labels("train")
    balanced, data = (measure.drawn_rows(unbalanced, COUNT, plan, 0) for plan in ("balanced", "data"))
    assert torch.bincount(labels[balanced]).tolist() == [15, 15, 15]
    assert torch.bincount(labels[data]).tolist() == [27, 9, 9]
    assert unbalanced.floor(COUNT, "balanced")["mix"] == ["balanced"]


@pytest.mark.parametrize("plan", ["balanced", "data"])
def test_real_images_reach_the_floor_in_either_mix(tmp_path: Path, unbalanced: Reference, plan: str) -> None:
    """On unbalanced data real images of a balanced plan were far from a floor in the natural mix."""
    counts = unbalanced.counts("train") if plan == "data" else np.ones(3, dtype=np.int64)
    body = evaluated(tmp_path, unbalanced, mixes.sequence(counts, COUNT), plan)
    other = unbalanced.moments("test", SPACE)
    spread = abs(frechet_distance(unbalanced.target(SPACE, match(unbalanced, plan).weights), other))
    assert body["floor_fd_classifier"] == unbalanced.floor(COUNT, plan)["fd_classifier"]  # type: ignore[arg-type]
    assert abs(body["excess_fd_classifier"]) < spread
    assert (body["mix"], body["notes"]) == ([plan], [])
    weighted = "the class mix of the data" if plan == "data" else "equal shares of the classes"
    texts = {entry["figure"]: entry["how"] for entry in body["protocol"]}
    assert f"weighted to {weighted}" in texts["fd_classifier"]
    assert f"drawn in {weighted}" in texts["kid_classifier"]
    assert f"subsets in {weighted}" in texts["recall_classifier"]


def test_what_cannot_be_matched_is_said_in_the_row(tmp_path: Path, unbalanced: Reference) -> None:
    listed, none, data = (
        evaluated(tmp_path / plan, unbalanced, mixes.sequence(np.array([0, 1, 1]), COUNT), plan)
        for plan in ("listed", "none", "data")
    )
    (reason,) = listed["notes"]
    assert reason.startswith("plan=listed samples chosen classes")
    (reason,) = none["notes"]
    assert reason.startswith("plan=none samples no classes")
    floor = unbalanced.floor(COUNT, "data")["fd_classifier"]
    for body in (listed, none):  # the same images against the same target and floor
        assert body["floor_fd_classifier"] == floor
        assert body["excess_fd_classifier"] == pytest.approx(body["fd_classifier"] - floor, rel=1e-4)
        told = ("mix", "notes")
        assert {key: body[key] for key in body if key not in told} == {
            key: data[key] for key in data if key not in told
        }
    lacking = reference_of(tmp_path / "lacking", (30, 30, 30), (40, 38, 0))
    (reason,) = match(lacking, "balanced").notes
    assert reason == "0.333 of the images are of classes without test images: aslant"
    few = reference_of(tmp_path / "few", (30, 30, 30), (40, 38, 3))
    (reason,) = match(few, "balanced").notes
    assert reason == "no KID: class 'aslant' has only 3 test images, too few for subsets in this mix"
    assert "kid_classifier" not in few.floor(COUNT, "balanced")
    assert "fd_classifier" in few.floor(COUNT, "balanced")


def test_what_samples_are_chosen_by_is_in_their_mix(unbalanced: Reference) -> None:
    target, mix = unbalanced.in_mix("validation", SPACE, "balanced")
    assert mix.tolist() == [1, 1, 1]
    labels, table = unbalanced.labels("validation"), unbalanced.features("validation", SPACE)
    mean = sum(table[labels == index].double().mean(0) for index in range(3)) / 3
    assert torch.allclose(target.mean, mean, rtol=0, atol=1e-9)  # type: ignore[arg-type]
    target, mix = unbalanced.in_mix("validation", SPACE, "data")
    assert mix.tolist() == list(TRAIN)
    assert target is unbalanced.moments("validation", SPACE)


def test_a_floor_that_cannot_be_drawn_in_equal_shares_is_refused() -> None:
    params = ReferenceParams(
        floor=FloorParams(counts=(90,)), protocol=ProtocolParams(extractors=(SPACE,), kid_subset_size=9)
    )
    (said,) = misfits(params, {"train": 100, "test": 100}, {"a": 60, "b": 20, "c": 20}, where="here")
    assert "class 'b' has only 20 train images" in said
    assert "sampling.shared.plan=data" in said
    assert "sampling.shared.images=60 or less" in said
    natural = params.model_copy(update={"floor": FloorParams(counts=(90,), plans=("data",))})
    assert misfits(natural, {"train": 100, "test": 100}, {"a": 60, "b": 20, "c": 20}, where="here") == []


@pytest.mark.parametrize("plan", ["balanced", "data"])
def test_matched_figures_are_those_of_the_drawn_images(tmp_path: Path, unbalanced: Reference, plan: str) -> None:
    """KID by its formula over the subsets' rows, precision and recall by counting balls over the resamples' rows."""
    counts = unbalanced.counts("train") if plan == "data" else np.ones(3, dtype=np.int64)
    body = evaluated(tmp_path, unbalanced, mixes.sequence(counts, COUNT), plan)
    pixels = torch.from_numpy(open_samples(tmp_path / "samples").images(0, COUNT)).permute(0, 3, 1, 2)
    own = unbalanced.extractor(SPACE)(pixels).double().numpy()
    real = unbalanced.features("test", SPACE).double().numpy()
    found, protocol = match(unbalanced, plan), unbalanced.protocol
    assert found.subsets is not None
    assert found.resamples is not None
    draw, values = np.random.RandomState(protocol.seed), []
    for subset in found.subsets:
        x, y = own[draw.choice(COUNT, 20, replace=False)], real[subset.numpy()]
        kernel = lambda a, b: (a @ b.T / own.shape[1] + 1) ** 3  # noqa: E731
        apart = ~np.eye(20, dtype=bool)
        values.append(kernel(x, x)[apart].mean() + kernel(y, y)[apart].mean() - 2 * kernel(x, y).mean())
    assert body["kid_classifier"] == pytest.approx(np.mean(values), rel=1e-4)
    precision, recall = [], []
    for rows in found.resamples:
        part = real[rows.numpy()]
        precision.append(inside(own, part, protocol.neighbours))
        recall.append(inside(part, own, protocol.neighbours))
    assert body["precision_classifier"] == pytest.approx(np.mean(precision), rel=1e-4)
    assert body["recall_classifier"] == pytest.approx(np.mean(recall), rel=1e-4)


def inside(points: NDArray[np.float64], centres: NDArray[np.float64], neighbours: int) -> float:
    """The share of points within the ball of any centre, which reaches to its `neighbours`-th neighbour."""
    radii = [np.sort(np.linalg.norm(centres - centre, axis=1))[neighbours] for centre in centres]
    return float(np.mean([(np.linalg.norm(centres - point, axis=1) <= radii).any() for point in points]))


def test_weighted_figures_of_real_images_are_those_of_repeated_ones(tmp_path: Path, unbalanced: Reference) -> None:
    """Class by class so many copies of each test image; 247 in all, so that the median is one of them."""
    labels = unbalanced.labels("test")
    copies = torch.tensor([1, 3, 4])[labels] + (torch.arange(len(labels)) < 7)
    assert int(copies.sum()) == 247
    weights = copies.double() / copies.sum()
    right = (unbalanced.guess(unbalanced.features("test", SPACE)) == labels).double()
    assert unbalanced.accuracy(weights) == pytest.approx(float(right.repeat_interleave(copies).mean()), abs=1e-12)
    assert unbalanced.accuracy(None) == pytest.approx(float(right.mean()), rel=1e-4)
    distances = torch.rand(len(labels), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / NEAREST, distances.numpy())
    known = Reference(tmp_path, dataclasses.replace(unbalanced.index, nearest_real=0.25))
    assert known.nearest_real(weights) == float(distances.repeat_interleave(copies).median())
    assert known.nearest_real(None) == 0.25
    assert unbalanced.nearest_real(weights) is None


def test_the_largest_subset_in_a_mix_has_every_image_of_the_scarcest_class() -> None:
    labels = np.repeat([0, 1], [29, 60])
    protocol: Any = SimpleNamespace(protocol=SimpleNamespace(neighbours=3, seed=0))
    found = _resamples(protocol, labels, np.array([100, 100]))  # 29 / 100 * 200 is 57.99… in floating point
    assert found is not None
    assert all(np.bincount(labels[rows.numpy()]).tolist() == [29, 29] for rows in found)


def test_a_figure_that_a_seed_lacks_is_left_out_of_the_means() -> None:
    means, intervals = measure.summarise([{"fd": 1.0, "diversity": 0.5}, {"fd": 2.0}])
    assert (means, set(intervals)) == ({"fd": 1.5}, {"fd"})
    means, _ = measure.summarise([{"fd": 1.0}, {"fd": 2.0, "diversity": 0.5}])
    assert means == {"fd": 1.5}


SHARES = {"data": [12, 4, 4], "balanced": [7, 7, 6]}  # of 20 images


@pytest.mark.parametrize("plan", ["data", "balanced"])
def test_a_tuning_samples_and_measures_in_its_plans_mix(
    tmp_path: Path, unbalanced: Reference, plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def measured(wanted: Any, *others: Any, target: Moments, labels: Tensor, **named: Any) -> dict[Any, float]:
        seen.update(target=target, labels=labels)
        return dict.fromkeys(wanted, 1.0)

    monkeypatch.setattr(tuning, "measure_all", measured)
    params = TuneParams(solvers=(SolverParams(sampler="euler", steps=2),), images=20, plan=plan, extractor=SPACE)
    model = make_model(tmp_path / "model", classes=CLASSES).path
    tune(params, name="a", model=model, reference=unbalanced.folder, output=tmp_path / "tuned", operation=CPU)
    assert torch.bincount(seen["labels"]).tolist() == SHARES[plan]
    target, _ = unbalanced.in_mix("validation", SPACE, plan)
    assert torch.equal(seen["target"].mean, target.mean)


@pytest.mark.parametrize("plan", ["data", "balanced"])
def test_a_distillation_is_validated_in_its_plans_mix(
    tmp_path: Path, unbalanced: Reference, plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[Tensor] = []

    def sample_items(*arguments: Any, condition: ClassCondition, **named: Any) -> Tensor:
        sampled.append(condition.labels)
        return items.sample_items(*arguments, condition=condition, **named)

    monkeypatch.setattr(validation, "sample_items", sample_items)
    model = make_model(tmp_path / "model", classes=CLASSES).path
    checks = ValidationParams(images=20, micro_batch=10, extractor=SPACE)
    student = StudentParams(
        teacher="a", init="a", steps=2, batch=4, plan=plan, validation=checks, gan=GanParams(generator_weight=0.1)
    )
    training, denoiser, _ = prepared(
        student,
        dataset=unbalanced.folder.with_name("dataset"),
        reference=unbalanced.folder,
        teacher=model,
        init=model,
        world=World(0, 1, torch.device("cpu")),
        cache="host",
    )
    distance = training._validation.distance(denoiser, training.ema)
    assert torch.bincount(torch.cat(sampled)).tolist() == SHARES[plan]
    target, _ = unbalanced.in_mix("validation", SPACE, plan)
    assert torch.equal(training._validation._target.mean, target.mean)
    assert np.isfinite(distance)
    assert training._loader is not None
    assert bool(training._loader._classes) == (plan == "balanced")  # the discriminator's real images
