"""Figures of feature tables: KID, precision and recall, diversity, nearest training neighbours, Inception Score.

Pure functions; distances and kernels in float64, on the device that the caller names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

BLOCK_BYTES = 256 << 20  # of a distance matrix held at a time


def kid(
    generated: Tensor, real: Tensor, *, subsets: int, size: int, seed: int, rows: Sequence[Tensor] | None = None
) -> float:
    """Kernel distance: mean over random subsets of the unbiased MMD² with kernel (x·y/d + 1)³ (Bińkowski et al. 2018).

    Subsets are drawn by `numpy.random.RandomState(seed)` in torch-fidelity's order, so that both give one number;
    `rows` gives the real images of each subset instead.
    """
    draw = np.random.RandomState(seed)
    total = 0.0
    for subset in range(subsets):
        x = generated[torch.from_numpy(draw.choice(len(generated), size, replace=False))].double()
        if rows is None:
            y = real[torch.from_numpy(draw.choice(len(real), size, replace=False))].double()
        else:
            y = real[rows[subset]].double()
        xx, yy, xy = _polynomial(x, x), _polynomial(y, y), _polynomial(x, y)
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        total += float(within - 2 * xy.mean())
    return total / subsets


def _polynomial(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def precision_recall(
    generated: Tensor, real: Tensor, *, neighbours: int, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019): shares inside the other set's k-nearest balls."""
    generated, real = generated.to(device, torch.float64), real.to(device, torch.float64)
    return (
        _inside(generated, real, _radii(real, neighbours)),
        _inside(real, generated, _radii(generated, neighbours)),
    )


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """Each point's distance to its k-th neighbour (itself is the zeroth)."""
    return torch.cat([block.kthvalue(neighbours + 1, dim=1).values for block in _distances(points, points)])


def _inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = [(block <= radii).any(dim=1) for block in _distances(points, centres)]
    return float(torch.cat(inside).double().mean())


def _distances(rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """The matrix of Euclidean distances, a few rows at a time."""
    size = max(1, BLOCK_BYTES // (8 * max(len(columns), 1)))
    for first in range(0, len(rows), size):
        yield torch.cdist(rows[first : first + size], columns)


def nearest(points: Tensor, pool: Tensor, *, own: Tensor | None = None, device: torch.device | str = "cpu") -> Tensor:
    """Each point's distance to the nearest of the pool, float64 [n].

    `own` [n] names the row of the pool that is the point itself and does not count.
    """
    points, pool = points.to(device, torch.float64), pool.to(device, torch.float64)
    found, done = [], 0
    for block in _distances(points, pool):
        if own is not None:
            rows = torch.arange(len(block), device=block.device)
            block[rows, own.to(block.device)[done : done + len(block)]] = math.inf
        found.append(block.min(dim=1).values)
        done += len(block)
    return torch.cat(found).cpu()


def spread(features: Tensor, labels: Tensor, classes: int) -> list[float | None]:
    """Mean Euclidean distance between two images of a class, for each class; None below two images.

    Unbiased for any number of images: the pairs of different images alone count.
    """
    found: list[float | None] = []
    for index in range(classes):
        members = features[labels == index].double()
        if len(members) < 2:
            found.append(None)
            continue
        total = sum(float(block.sum()) for block in _distances(members, members))
        found.append(total / (len(members) * (len(members) - 1)))
    return found


def diversity(generated: Sequence[float | None], real: Sequence[float | None]) -> float | None:
    """Within-class spread relative to real images (1: as diverse, 0: one image a class), mean over classes.

    A class in which real images do not differ, or which has fewer than two on either side, says nothing.
    """
    ratios = [g / r for g, r in zip(generated, real, strict=True) if g is not None and r is not None and r > 0]
    return sum(ratios) / len(ratios) if ratios else None


def inception_score(logits: Tensor, *, splits: int, seed: int) -> float:
    """Inception Score (Salimans et al. 2016) of logits without bias, by torch-fidelity's function.

    Of fewer images than `splits`, each is a split of its own (an empty one would have no score).
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    return float(isc_features_to_metric(logits.cpu(), min(splits, len(logits)), True, seed)[KEY_METRIC_ISC_MEAN])
