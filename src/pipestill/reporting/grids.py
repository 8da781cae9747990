"""Pictures of a report: the same items of every run as one grid each, rows by class, real images beside them.

Equal pixels give equal bytes. Gaps are transparent, so that a grid sits on light and dark pages.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipestill.config import ReportParams
from pipestill.data.store import Dataset
from pipestill.reporting.sources import Sources
from pipestill.sampling.pictures import pick_classes, pick_items
from pipestill.sampling.store import open_samples

Pixels = NDArray[np.uint8]
WIDEST = 640  # pixels of a grid; fewer columns and smaller cells where images are large
SMALLEST_CELL = 16  # smaller images are enlarged by a whole factor
LARGEST_CELL = 128
LOSSLESS = 300 * 300  # pixels; a larger colour picture is stored as WebP with losses, others as PNG


def make_grids(sources: Sources, dataset: Dataset, params: ReportParams) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The grids' description for report.json, and their files by name.

    The first images of each class in a run's first seed are shown: runs with equal seeds and plans show the same items.
    """
    rows = pick_classes(np.flatnonzero(dataset.train_counts).tolist(), params.grid_rows)
    columns = fitting_columns(dataset.resolution, params.grid_columns)
    names = [dataset.classes[row] for row in rows]
    files: dict[str, bytes] = {}

    def add(name: str, images: Sequence[Pixels | None]) -> dict[str, Any]:
        picture, ending = encode(tile(images, columns))
        files[f"{name}.{ending}"] = picture
        return {"file": f"{name}.{ending}", "images": sum(image is not None for image in images)}

    listing = {}
    for name, artifact in sources.samples.items():
        samples = open_samples(artifact.path)
        items = pick_items(samples.labels[: samples.images_per_seed], rows, columns, params.grid_rows)

        listing[name] = add(f"grids/{name}", _read(items, samples.picture))
    real = {
        part: add(f"real/{part}", _real(dataset, part, rows, columns, params.grid_rows)) for part in ("train", "test")
    }
    return {"rows": names, "columns": columns, "runs": listing, "real": real}, files


def _real(dataset: Dataset, part: str, rows: Sequence[int], columns: int, unlabelled_rows: int) -> list[Pixels | None]:
    """The first images of each class of a part, in the dataset's order."""
    members = dataset.split[part]
    labels = dataset.labels[members] if len(dataset.classes) else np.full(len(members), -1)
    items = pick_items(labels, rows, columns, unlabelled_rows)
    return _read(items, lambda item: dataset.images(members[item : item + 1])[0])


def _read(items: Sequence[int | None], read: Callable[[int], Pixels | None]) -> list[Pixels | None]:
    return [None if item is None else read(item) for item in items]


def fitting_columns(resolution: int, wanted: int) -> int:
    """As many columns as fit the widest grid, at least two."""
    cell = min(max(resolution, SMALLEST_CELL), LARGEST_CELL)
    return max(2, min(wanted, WIDEST // cell))


def tile(images: Sequence[Pixels | None], columns: int) -> Pixels:
    """Images uint8 [H, W, 1 or 3] in rows of `columns` with transparent gaps: uint8 [H', W', 2 or 4], alpha last."""
    shown = [image for image in images if image is not None]
    if not shown:
        return np.zeros((1, 1, 2), dtype=np.uint8)
    shown = [_sized(image) for image in shown]
    side, channels = shown[0].shape[0], shown[0].shape[2]
    gap = max(1, side // 16)
    rows = -(-len(images) // columns)
    canvas = np.zeros((rows * (side + gap) - gap, columns * (side + gap) - gap, channels + 1), dtype=np.uint8)
    rest = iter(shown)
    for index, image in enumerate(images):
        if image is not None:
            top, left = index // columns * (side + gap), index % columns * (side + gap)
            canvas[top : top + side, left : left + side, :channels] = next(rest)
            canvas[top : top + side, left : left + side, channels] = 255
    return canvas


def _sized(image: Pixels) -> Pixels:
    side = image.shape[0]
    if side > LARGEST_CELL:
        flat = image.squeeze(-1) if image.shape[-1] == 1 else image
        small = np.asarray(Image.fromarray(flat).resize((LARGEST_CELL, LARGEST_CELL), Image.Resampling.BOX))
        return small.reshape(LARGEST_CELL, LARGEST_CELL, image.shape[-1])
    factor = max(1, -(-SMALLEST_CELL // side))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def encode(picture: Pixels) -> tuple[bytes, str]:
    """Bytes and file ending: PNG for small cells, WebP for large colour pictures."""
    buffer = io.BytesIO()
    if picture.shape[2] == 4 and picture.shape[0] * picture.shape[1] > LOSSLESS:
        Image.fromarray(picture, "RGBA").save(buffer, "WEBP", quality=92, method=4)
        return buffer.getvalue(), "webp"
    Image.fromarray(picture, "RGBA" if picture.shape[2] == 4 else "LA").save(buffer, "PNG", optimize=True)
    return buffer.getvalue(), "png"
