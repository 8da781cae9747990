"""From sampler to features: what is measured of images, computed where they are made, so that none is ever written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipestill.evaluation.extractors import Extractor
from pipestill.sampling.items import to_uint8
from pipestill.sampling.writer import Product


def in_spaces(extractors: Sequence[Extractor]) -> Product:
    """The product that is measured: features of the images as uint8 pixels, of all spaces in one row."""

    def features(x0: Tensor) -> Tensor:
        pixels = to_uint8(x0)
        return torch.cat([extractor(pixels) for extractor in extractors], dim=1)

    return features


def by_space(rows: NDArray[np.float32], extractors: Sequence[Extractor]) -> dict[str, Tensor]:
    """The tables [n, d] of each space from rows of `in_spaces`."""
    parts = torch.from_numpy(rows).split([extractor.dimension for extractor in extractors], dim=1)
    return {extractor.name: part for extractor, part in zip(extractors, parts, strict=True)}
