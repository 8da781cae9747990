"""Each figure against an independent one: brute force, closed forms, torch-fidelity, scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipestill import mixes
from pipestill.evaluation import metrics
from pipestill.evaluation.intervals import mean_and_interval
from pipestill.evaluation.matching import chosen


def points(count: int, dimension: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randn(count, dimension) + shift)


def distances(x: Tensor, y: Tensor) -> np.ndarray:
    return np.sqrt(((x.numpy()[:, None] - y.numpy()[None]) ** 2).sum(-1))


# --- KID


def test_kid_is_the_unbiased_mmd_of_the_cubic_kernel() -> None:
    x, y = points(7, 3, 0), points(7, 3, 1, shift=0.5)
    kernel = lambda a, b: (float(a @ b) / 3 + 1) ** 3  # noqa: E731
    within = sum(kernel(t[i], t[j]) for t in (x, y) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    across = sum(kernel(a, b) for a in x for b in y) / 49
    assert metrics.kid(x, y, subsets=1, size=7, seed=0) == pytest.approx(within - 2 * across, rel=1e-12)


def test_kid_is_torch_fidelitys() -> None:
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    x, y = points(90, 16, 2), points(70, 16, 3, shift=0.2)
    theirs = kid_features_to_metric(x, y, kid_subsets=7, kid_subset_size=40, rng_seed=5, verbose=False)
    assert metrics.kid(x, y, subsets=7, size=40, seed=5) == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-10)


# --- precision and recall


def by_brute_force(generated: Tensor, real: Tensor, neighbours: int) -> tuple[float, float]:
    def inside(rows: Tensor, centres: Tensor) -> float:
        radii = np.sort(distances(centres, centres), axis=1)[:, neighbours]
        return float((distances(rows, centres) <= radii[None]).any(1).mean())

    return inside(generated, real), inside(real, generated)


def test_precision_and_recall_by_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    generated, real = points(60, 4, 4), points(50, 4, 5, shift=0.7)
    expected = by_brute_force(generated, real, 3)
    assert 0.1 < expected[0] < 0.9
    assert expected[0] != expected[1]
    assert metrics.precision_recall(generated, real, neighbours=3) == pytest.approx(expected)
    monkeypatch.setattr(metrics, "BLOCK_BYTES", 7 * 8 * 50)  # blocks of seven rows
    assert metrics.precision_recall(generated, real, neighbours=3) == pytest.approx(expected)


def test_precision_and_recall_are_torch_fidelitys() -> None:
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    generated, real = points(80, 6, 6), points(70, 6, 7, shift=0.5)
    theirs = prc_features_to_metric(generated, real, prc_neighborhood=4, verbose=False)
    ours = metrics.precision_recall(generated, real, neighbours=4)
    assert ours == pytest.approx((theirs[KEY_METRIC_PRECISION], theirs[KEY_METRIC_RECALL]), abs=1e-6)


def test_a_lost_mode_costs_recall_and_not_precision() -> None:
    real = torch.cat([points(50, 4, 8), points(50, 4, 9, shift=30.0)])
    generated = points(50, 4, 10)
    precision, recall = metrics.precision_recall(generated, real, neighbours=3)
    assert precision > 0.8
    assert recall < 0.5


# --- nearest neighbours


def test_nearest_by_brute_force_and_without_oneself(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = points(40, 5, 11)
    monkeypatch.setattr(metrics, "BLOCK_BYTES", 1000)
    sample = points(17, 5, 12)
    torch.testing.assert_close(metrics.nearest(sample, pool).numpy(), distances(sample, pool).min(1))
    own = torch.tensor([3, 0, 39, 7, 8, 9, 10, 12])
    expected = distances(pool[own], pool)
    expected[np.arange(8), own.numpy()] = np.inf
    torch.testing.assert_close(metrics.nearest(pool[own], pool, own=own).numpy(), expected.min(1))
    assert metrics.nearest(pool[own], pool).max() < 1e-6


# --- diversity


def test_spread_is_the_mean_distance_of_pairs() -> None:
    from scipy.spatial.distance import pdist

    features, labels = points(30, 3, 13), torch.arange(30) % 2
    found = metrics.spread(features, labels, 4)
    assert found[2] is None
    assert found[3] is None
    assert found[:2] == pytest.approx([pdist(features[labels == index].numpy()).mean() for index in (0, 1)])
    pair = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert metrics.spread(pair, torch.zeros(2, dtype=torch.int64), 1) == [pytest.approx(5.0)]


def test_diversity_sees_a_collapse_whatever_the_classes_do() -> None:
    labels = torch.arange(300) % 3
    centres = 10.0 * torch.eye(3, dtype=torch.float64)[labels]
    real = metrics.spread(points(300, 3, 14) + centres, labels, 3)

    def of(sampled: Tensor) -> float:
        found = metrics.diversity(metrics.spread(sampled + centres, labels, 3), real)
        assert found is not None
        return found

    assert of(points(300, 3, 15)) == pytest.approx(1.0, abs=0.07)
    assert of(torch.zeros(300, 3)) == pytest.approx(0.0, abs=1e-6)  # one image a class, and classes still far apart
    assert of(0.5 * points(300, 3, 16)) == pytest.approx(0.5, abs=0.05)
    two = points(2, 3, 17)[torch.arange(300) // 3 % 2]  # two images a class
    assert of(two) < 0.9


def test_diversity_leaves_out_classes_that_say_nothing() -> None:
    assert metrics.diversity([1.0, None, 3.0, 5.0], [2.0, 1.0, None, 0.0]) == 0.5
    assert metrics.diversity([None], [1.0]) is None


# --- Inception Score and intervals


def test_inception_score_has_its_known_ends() -> None:
    certain = 100.0 * torch.eye(4).repeat(50, 1)
    assert metrics.inception_score(certain, splits=1, seed=0) == pytest.approx(4.0, rel=1e-6)
    assert metrics.inception_score(torch.zeros(40, 4), splits=2, seed=0) == pytest.approx(1.0, rel=1e-6)


def test_intervals_are_students() -> None:
    from scipy import stats

    values = [3.0, 4.5, 4.0, 5.5, 3.5]
    mean, interval = mean_and_interval(values)
    expected = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert mean == pytest.approx(4.1)
    assert interval == pytest.approx(expected, rel=1e-9)
    assert mean_and_interval([2.5]) == (2.5, None)


# --- stratified draws


def stratified(labels: torch.Tensor, count: int, *, seed: int, draw: int) -> torch.Tensor:
    sizes = mixes.apportioned(torch.bincount(labels).numpy(), count)
    return chosen(labels.numpy(), sizes, seed=seed, purpose="floor", draw=draw)


def test_draws_keep_the_classes_proportions_and_repeat_nothing() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    drawn = stratified(labels, 50, seed=0, draw=0)
    assert len(set(drawn.tolist())) == 50
    assert torch.equal(drawn, drawn.sort().values)
    assert torch.bincount(labels[drawn]).tolist() == [30, 15, 5]
    assert torch.bincount(labels[stratified(labels, 7, seed=0, draw=0)]).tolist() == [4, 2, 1]
    assert torch.equal(drawn, stratified(labels, 50, seed=0, draw=0))
    assert not torch.equal(drawn, stratified(labels, 50, seed=0, draw=1))
    assert not torch.equal(drawn, stratified(labels, 50, seed=1, draw=0))
    assert torch.equal(stratified(labels, 100, seed=0, draw=0), torch.arange(100))


def test_draws_reach_every_image() -> None:
    labels = torch.zeros(20, dtype=torch.int64)
    counts = torch.zeros(20)
    for draw in range(400):
        counts[stratified(labels, 5, seed=0, draw=draw)] += 1
    assert counts.min() > 60
    assert counts.max() < 145
