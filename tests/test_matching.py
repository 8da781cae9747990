"""Runs, floors, tuning and validation are compared with images of their own class mix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from evaluation_artifacts import CLASSES, drawn, make_samples, publish_dataset
from pipestill import mixes
from pipestill.config import (
    ClassifierParams,
    EvaluationParams,
    FloorParams,
    OperationParams,
    ProtocolParams,
    ReferenceParams,
)
from pipestill.evaluation import measure
from pipestill.evaluation.limits import misfits
from pipestill.evaluation.matching import match
from pipestill.evaluation.moments import Moments, frechet_distance
from pipestill.evaluation.reference import Reference, open_reference
from pipestill.stages.evaluate import evaluate
from pipestill.stages.reference import build_reference

CPU = OperationParams(device="cpu")
TRAIN, TEST = (60, 20, 20), (90, 30, 15)  # images per class
SPACE = "classifier"
COUNT = 45


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
        drawn_labels = torch.cat([labels[rows] for rows in found.subsets])
        assert all(len(rows) == len(rows.unique()) == 20 for rows in found.subsets)
        assert torch.bincount(drawn_labels).tolist() == pytest.approx([80 * share for share in shares], abs=20)
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
    listed = evaluated(tmp_path / "listed", unbalanced, mixes.sequence(np.array([0, 1, 1]), COUNT), "listed")
    (reason,) = listed["notes"]
    assert reason.startswith("plan=listed samples chosen classes")
    assert listed["floor_fd_classifier"] == unbalanced.floor(COUNT, "data")["fd_classifier"]
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
