"""The embedded example images: scikit-learn's digits, and patches of scikit-image's photographs of textures.

Both packages carry the images; nothing is downloaded. Pure functions that yield names and pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipestill.config import ExampleParams

Named = tuple[str, NDArray[np.uint8]]  # path below the images' folder, grey pixels [H, W]
TEXTURES = ("brick", "grass", "gravel")
ROWS = {"train": (0, 272), "validation": (272, 352), "test": (352, 512)}  # strips of the 512 rows of a photograph


def example_images(example: ExampleParams) -> Iterator[Named]:
    """The images of an embedded example, by class folder, in a fixed order."""
    return digits() if example.kind == "digits" else textures(example.patch, example.stride)


def digits() -> Iterator[Named]:
    """scikit-learn's 1,797 digits, 8x8; its values 0..16 become 0..255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    for index, (image, label) in enumerate(zip(pixels, bunch.target, strict=True)):
        yield f"{label}/{index:04d}.png", image


@dataclass(frozen=True)
class Patch:
    """A square of a photograph: its texture, part, and where its top left pixel is."""

    texture: str
    part: str
    row: int
    column: int

    @property
    def name(self) -> str:
        return f"{self.part}/{self.texture}/r{self.row:03d}-c{self.column:03d}.png"


def patches(side: int, stride: int) -> Iterator[Patch]:
    """Where patches are cut: every `stride` pixels for training, every half side for validation and test.

    Each part has a strip of rows of its own, so no pixel of one part is in a patch of another.
    """
    for part, (first, last) in ROWS.items():
        step = stride if part == "train" else side // 2
        for texture in TEXTURES:
            for row in range(first, last - side + 1, step):
                for column in range(0, 512 - side + 1, step):
                    yield Patch(texture, part, row, column)


def textures(side: int, stride: int) -> Iterator[Named]:
    """Grey patches [side, side] of brick, grass and gravel (512x512 each), below train/, validation/ and test/."""
    from skimage import data

    photographs = {name: getattr(data, name)() for name in TEXTURES}
    for patch in patches(side, stride):
        square = photographs[patch.texture][patch.row : patch.row + side, patch.column : patch.column + side]
        yield patch.name, square
