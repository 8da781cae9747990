"""Float64 moments of feature tables and the Fréchet distance between them.

Sums run over fixed lanes of rows, so that the bits of a moment do not depend on how many ranks shared the work.
Pure functions of tensors, but for one all-reduce and the reading of statistics files.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipestill.errors import InputError

LANES = 16  # independent partial sums, fixed: what ranks share, whatever their number
ROWS = 4096  # rows of a table that are turned to float64 at a time


class Ranks(Protocol):
    """What is needed of a group of ranks (`pipestill.distributed.World`)."""

    rank: int
    size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks."""


@dataclass(frozen=True)
class Moments:
    """Mean [d] and covariance [d, d] (N - 1 in the denominator) of `count` feature vectors, float64 on the CPU.

    `count` is 0 where a statistics file does not say how many images it was made of.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    @staticmethod
    def of(features: Tensor, ranks: Ranks | None = None, device: torch.device | str | None = None) -> Moments:
        """Moments of a feature table [n, d] that every rank can read; ranks share its lanes and sum them once.

        The table is turned to float64 on `device` (by default its own) a few thousand rows at a time, so it may be a
        memory-mapped file. The bits are the same for any number of ranks. Raises InputError for fewer than two rows.
        """
        sums = MomentSums(features.shape[1], features.device if device is None else device)
        bounds = [len(features) * lane // LANES for lane in range(LANES + 1)]
        own = range(LANES) if ranks is None else range(ranks.rank, LANES, ranks.size)
        for lane in own:
            for first in range(bounds[lane], bounds[lane + 1], ROWS):
                sums.add(features[first : min(first + ROWS, bounds[lane + 1])], lane)
        if ranks is not None:
            sums.reduce(ranks)
        return sums.moments()

    @staticmethod
    def weighted(features: Tensor, weights: Tensor, device: torch.device | str | None = None) -> Moments:
        """Moments of a feature table [n, d] whose rows count by `weights` [n] of sum 1; unbiased covariance.

        Equal weights give what `of` gives, up to rounding. Raises InputError for fewer than two rows with a weight.
        """
        count = int((weights > 0).sum())
        if count < 2:
            raise InputError(f"moments need at least 2 images, there are {count}: give more images")
        device = features.device if device is None else device
        weights = weights.to(device, torch.float64)
        mean = torch.zeros(features.shape[1], dtype=torch.float64, device=device)
        for first in range(0, len(features), ROWS):
            rows = features[first : first + ROWS].to(device, torch.float64)
            mean += weights[first : first + ROWS] @ rows
        covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=device)
        for first in range(0, len(features), ROWS):
            rows = features[first : first + ROWS].to(device, torch.float64) - mean
            covariance += rows.T @ (weights[first : first + ROWS, None] * rows)
        covariance /= 1 - (weights**2).sum()
        return Moments(mean.cpu(), covariance.cpu(), count)


class MomentSums:
    """Running float64 sums of f and f f^T over streamed features, kept in `LANES` partial sums."""

    def __init__(self, dimension: int, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._sums: dict[int, Tensor] = {}
        self._size = dimension + 1

    def add(self, features: Tensor, lane: int = 0) -> None:
        """Adds rows [n, d] to a lane; within a lane, order decides the last bits."""
        rows = features.to(self._device, torch.float64)
        ones = torch.ones(len(rows), 1, dtype=torch.float64, device=self._device)
        extended = torch.cat([ones, rows], dim=1)
        update = extended.T @ extended  # [[n, sum f], [sum f, sum f f^T]]
        self._sums[lane] = self._sums[lane] + update if lane in self._sums else update

    def reduce(self, ranks: Ranks) -> None:
        """Adds every rank's lanes in one all-reduce.

        Where each lane is filled by one rank alone, as `Moments.of` has it, the others add exact zeros.
        """
        table = torch.zeros(LANES, self._size, self._size, dtype=torch.float64, device=self._device)
        for lane, sums in self._sums.items():
            table[lane] = sums
        self._sums = dict(enumerate(ranks.sum(table)))

    def moments(self) -> Moments:
        """Mean and covariance of everything added. Raises InputError for fewer than two rows."""
        total = torch.zeros(self._size, self._size, dtype=torch.float64, device=self._device)
        for lane in sorted(self._sums):
            total = total + self._sums[lane]
        count = int(total[0, 0].item())
        if count < 2:
            raise InputError(f"moments need at least 2 images, there are {count}: give more images")
        mean = total[0, 1:] / count
        covariance = (total[1:, 1:] - count * torch.outer(mean, mean)) / (count - 1)
        return Moments(mean.cpu(), covariance.cpu(), count)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance |m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½) (Dowson and Landau 1982; Heusel et al. 2017).

    By `eigh` of one covariance's root and `eigvalsh` of the product. Holds for rank-deficient covariances (fewer
    images than features) too, since the root is taken within the smaller range: no ridge, no complex numbers.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"features of {a.mean.numel()} and of {b.mean.numel()} numbers cannot be compared")
    first, second = (a, b) if _rank_bound(a) <= _rank_bound(b) else (b, a)
    values, vectors = torch.linalg.eigh(first.covariance)
    inside = _above_rounding(values)
    root = vectors[:, inside] * values[inside].sqrt()
    product = root.T @ second.covariance @ root
    spectrum = torch.linalg.eigvalsh((product + product.T) / 2)
    common = spectrum[_above_rounding(spectrum)].sqrt().sum()
    difference = a.mean - b.mean
    trace = torch.trace(a.covariance) + torch.trace(b.covariance)
    return float(difference @ difference + trace - 2 * common)


def _above_rounding(values: Tensor) -> Tensor:
    """Which of a covariance's eigenvalues, ascending, are more than rounding: a root would magnify the rest."""
    return values > values[-1:].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps


def _rank_bound(moments: Moments) -> int:
    """The largest rank that a covariance of so many images can have."""
    dimension = moments.mean.numel()
    return dimension if moments.count == 0 else min(dimension, moments.count - 1)


def read_statistics(path: Path, dimension: int) -> Moments:
    """Moments from an npz with `mu` and `sigma`, the form of EDM, pytorch-fid, clean-fid and guided-diffusion.

    Further arrays (`arr_0`, `mu_s`, `sigma_s`) are left alone. Raises InputError naming what is wrong with the file.
    """
    advice = "give an npz with mu and sigma of these features"
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = " and ".join(name for name in ("mu", "sigma") if name not in file.files)
            if missing:
                raise InputError(
                    f"{path} holds {', '.join(sorted(file.files)) or 'nothing'} but no {missing}: {advice}"
                )
            mean = np.asarray(file["mu"], dtype=np.float64)
            covariance = np.asarray(file["sigma"], dtype=np.float64)
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no readable npz ({' '.join(str(error).split())}): {advice}") from error
    if mean.shape != (dimension,) or covariance.shape != (dimension, dimension):
        raise InputError(
            f"{path} has mu {mean.shape} and sigma {covariance.shape}, ({dimension},) and ({dimension}, {dimension}) "
            "were expected: it was made with other features"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{path} holds numbers that are not finite: {advice}")
    return Moments(torch.from_numpy(mean), torch.from_numpy(covariance), 0)
