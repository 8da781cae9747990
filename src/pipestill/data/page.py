"""The report on a dataset as files: `report.json`, and one page with contact sheets that stands alone.

Pages are rendered with Jinja. May write into the folder that it is given.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipestill.sampling.pictures import grid, png_bytes

Images = Callable[[NDArray[np.int64]], NDArray[np.uint8]]
SHEET_COLUMNS = 16
PAIRS_SHOWN = 32
SHEET_SIDE = 64  # larger images are shown this small on sheets
SHEETS_TOTAL = 1024  # images on all sheets together, where classes are many


def contact_sheets(classes: tuple[str, ...], labels: NDArray[np.int64], images: Images) -> list[tuple[str, bytes]]:
    """For each class (or for all images together, without labels) its name and a PNG of images spread over it."""
    each = int(np.clip(SHEETS_TOTAL // max(len(classes), 1), 2, 2 * SHEET_COLUMNS))
    sheets = []
    for number, name in enumerate(classes) if classes else [(-1, "all images")]:
        members = np.flatnonzero(labels == number)
        if len(members):
            chosen = members[np.linspace(0, len(members) - 1, min(each, len(members))).round().astype(np.int64)]
            sheets.append((name, png_bytes(grid(_small(images(chosen)), columns=SHEET_COLUMNS))))
    return sheets


def nearest_pairs_sheet(report: dict[str, Any], names: list[str], images: Images) -> bytes:
    """The nearest pairs side by side as a PNG, empty where there are none: is a near pair a repeat, or just alike?"""
    listed = report["duplicates"]["near"]["files"][:PAIRS_SHOWN]
    if not listed:
        return b""
    wanted = {pair[which] for pair in listed for which in ("first", "second")}
    index = {name: number for number, name in enumerate(names) if name in wanted}
    chosen = np.array([index[pair[which]] for pair in listed for which in ("first", "second")], dtype=np.int64)
    return png_bytes(grid(_small(images(chosen)), columns=SHEET_COLUMNS))


def _small(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if images.shape[1] <= SHEET_SIDE:
        return images
    size = (SHEET_SIDE, SHEET_SIDE)
    shrunk = [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).resize(size) for image in images]
    return np.stack([np.asarray(image) for image in shrunk]).reshape(len(images), *size, images.shape[-1])


def write_report(
    folder: Path,
    report: dict[str, Any],
    *,
    classes: tuple[str, ...],
    labels: NDArray[np.int64],
    names: list[str],
    images: Images,
) -> None:
    """Writes `report.json`, and `report.html` with contact sheets of the images that it is about."""
    (folder / "report.json").write_text(
        json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    sheets = contact_sheets(classes, labels, images)
    (folder / "report.html").write_text(
        render(report, sheets, nearest_pairs_sheet(report, names, images)), encoding="utf-8"
    )


def render(report: dict[str, Any], sheets: list[tuple[str, bytes]], pairs: bytes) -> str:
    """The report as one HTML page with everything in it; `sheets` and `pairs` are PNGs."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.j2").render(
        report=report, sheets=[(name, _base64(png)) for name, png in sheets], pairs=_base64(pairs)
    )


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode()
