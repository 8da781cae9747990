"""Moments and the Fréchet distance: closed forms, scipy's matrix root, torch-fidelity, rank deficiency, sharding."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipestill.errors import InputError
from pipestill.evaluation.moments import LANES, Moments, MomentSums, frechet_distance, read_statistics


def table(count: int, dimension: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    rng = np.random.RandomState(seed)
    mixing = rng.randn(dimension, dimension) / np.sqrt(dimension)
    return torch.from_numpy((rng.randn(count, dimension) @ mixing * scale + shift).astype(np.float32))


class Threads:
    """Ranks as threads of this process: `sum` meets the others and adds up in rank order."""

    def __init__(self, size: int) -> None:
        self.size, self._barrier, self._given = size, threading.Barrier(size), [torch.empty(0)] * size

    def views(self) -> list[Rank]:
        return [Rank(self, rank) for rank in range(self.size)]

    def sum(self, rank: int, tensor: Tensor) -> Tensor:
        self._given[rank] = tensor.clone()
        self._barrier.wait()
        total = sum(self._given[1:], start=self._given[0].clone())
        self._barrier.wait()
        return total


class Rank:
    def __init__(self, group: Threads, rank: int) -> None:
        self._group, self.rank, self.size = group, rank, group.size

    def sum(self, tensor: Tensor) -> Tensor:
        return self._group.sum(self.rank, tensor)


def test_moments_are_numpys_mean_and_covariance() -> None:
    features = table(997, 13, seed=1, shift=3.0)
    moments = Moments.of(features)
    assert moments.count == 997
    np.testing.assert_allclose(moments.mean.numpy(), features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        moments.covariance.numpy(), np.cov(features.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12
    )


def test_streamed_sums_agree_with_the_whole_table() -> None:
    features = table(500, 8, seed=2)
    sums = MomentSums(8)
    for first in range(0, 500, 64):
        sums.add(features[first : first + 64])
    whole, streamed = Moments.of(features), sums.moments()
    torch.testing.assert_close(streamed.covariance, whole.covariance, rtol=1e-12, atol=1e-13)
    assert streamed.count == whole.count


@pytest.mark.parametrize("size", [2, 3, 5])
def test_any_number_of_ranks_gives_the_same_bits(size: int) -> None:
    features = table(333, 7, seed=3)
    alone = Moments.of(features)
    views = Threads(size).views()
    found: list[Moments | None] = [None] * size

    def work(rank: int) -> None:
        found[rank] = Moments.of(features, views[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for moments in found:
        assert moments is not None
        assert torch.equal(moments.mean, alone.mean)
        assert torch.equal(moments.covariance, alone.covariance)
        assert moments.count == 333


def test_a_table_shorter_than_the_lanes() -> None:
    assert LANES > 3
    features = table(3, 2, seed=4)
    torch.testing.assert_close(Moments.of(features).covariance, torch.cov(features.double().T))


def test_one_row_has_no_covariance() -> None:
    with pytest.raises(InputError, match="at least 2 images, there are 1"):
        Moments.of(torch.zeros(1, 4))


def test_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    a = Moments(torch.tensor([1.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 9.0])).double(), 100)
    b = Moments(torch.tensor([0.0, 4.0]).double(), torch.diag(torch.tensor([1.0, 16.0])).double(), 100)
    assert frechet_distance(a, b) == pytest.approx((1 + 4) + (2 - 1) ** 2 + (3 - 4) ** 2, rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_distance_agrees_with_scipys_matrix_root() -> None:
    import scipy.linalg

    a, b = Moments.of(table(400, 24, seed=5)), Moments.of(table(300, 24, seed=6, scale=1.3, shift=0.2))
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    difference = (a.mean - b.mean).numpy()
    expected = difference @ difference + np.trace(a.covariance + b.covariance - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-11)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-11)


def test_distance_agrees_with_torch_fidelity() -> None:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    first, second = table(400, 24, seed=7).double(), table(300, 24, seed=8, scale=0.7, shift=-0.1).double()
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(first), fid_features_to_statistics(second), verbose=False
    )[KEY_METRIC_FID]
    assert frechet_distance(Moments.of(first), Moments.of(second)) == pytest.approx(theirs, rel=1e-10)


def nuclear_norm_distance(first: Tensor, second: Tensor) -> float:
    """The distance by the cross-Gram matrix of the centred tables: exact for any rank."""
    x, y = (t.double() - t.double().mean(0) for t in (first, second))
    x, y = x / (len(x) - 1) ** 0.5, y / (len(y) - 1) ** 0.5
    common = torch.linalg.matrix_norm(x @ y.T, ord="nuc")
    difference = first.double().mean(0) - second.double().mean(0)
    return float(difference @ difference + (x * x).sum() + (y * y).sum() - 2 * common)


@pytest.mark.parametrize(("count", "other"), [(20, 500), (500, 20), (30, 12), (2, 2)])
def test_distance_is_exact_for_fewer_images_than_features(count: int, other: int) -> None:
    first, second = table(count, 64, seed=9), table(other, 64, seed=10, scale=1.5, shift=0.3)
    expected = nuclear_norm_distance(first, second)
    assert frechet_distance(Moments.of(first), Moments.of(second)) == pytest.approx(expected, rel=1e-9)


def test_distance_is_exact_where_a_feature_never_changes() -> None:
    first, second = table(300, 16, seed=11), table(300, 16, seed=12)
    first[:, 3] = 0.0
    second[:, 5] = 1.0
    expected = nuclear_norm_distance(first, second)
    assert frechet_distance(Moments.of(first), Moments.of(second)) == pytest.approx(expected, rel=1e-9)


def test_distance_to_constant_images() -> None:
    first, second = table(300, 16, seed=13), torch.ones(50, 16)
    moments = Moments.of(first)
    expected = float((moments.mean - 1).square().sum() + torch.trace(moments.covariance))
    assert frechet_distance(moments, Moments.of(second)) == pytest.approx(expected, rel=1e-9)


def test_different_dimensions_are_refused() -> None:
    with pytest.raises(InputError, match="features of 4 and of 5 numbers"):
        frechet_distance(Moments.of(table(9, 4, seed=0)), Moments.of(table(9, 5, seed=0)))


def test_statistics_files_are_read(tmp_path: Path) -> None:
    moments = Moments.of(table(50, 6, seed=14))
    extra = {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "mu_s": np.zeros(3), "sigma_s": np.zeros((3, 3))}
    np.savez(tmp_path / "stats.npz", mu=moments.mean.numpy(), sigma=moments.covariance.numpy(), **extra)
    found = read_statistics(tmp_path / "stats.npz", 6)
    assert torch.equal(found.mean, moments.mean)
    assert torch.equal(found.covariance, moments.covariance)
    assert found.count == 0
    assert frechet_distance(found, moments) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"mu": np.zeros(6)}, "holds mu but no sigma"),
        ({"images": np.zeros(6)}, "no mu and sigma"),
        ({"mu": np.zeros(5), "sigma": np.zeros((5, 5))}, r"has mu \(5,\).*\(6,\) and \(6, 6\)"),
        ({"mu": np.full(6, np.nan), "sigma": np.zeros((6, 6))}, "not finite"),
        ({"mu": np.array([None] * 6), "sigma": np.zeros((6, 6))}, "no readable npz"),
    ],
)
def test_wrong_statistics_files_are_refused(tmp_path: Path, content: dict[str, np.ndarray], said: str) -> None:
    np.savez(tmp_path / "stats.npz", **content)
    with pytest.raises(InputError, match=said):
        read_statistics(tmp_path / "stats.npz", 6)


def test_a_statistics_file_that_is_no_npz(tmp_path: Path) -> None:
    (tmp_path / "stats.npz").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(InputError, match="no readable npz"):
        read_statistics(tmp_path / "stats.npz", 6)
    with pytest.raises(InputError, match="no readable npz"):
        read_statistics(tmp_path / "absent.npz", 6)
