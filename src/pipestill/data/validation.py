"""What a careful person would look at before training on images: one report, as JSON and as a page that stands alone.

The report is a function of the images, their labels and the split: no date, no place. Pages are rendered with Jinja.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipestill.data.duplicates import exact_groups, near_pairs
from pipestill.data.ingest import Ingested
from pipestill.data.source import Source
from pipestill.data.store import PARTS
from pipestill.data.transforms import Form
from pipestill.sampling.pictures import grid, png_bytes

Images = Callable[[NDArray[np.int64]], NDArray[np.uint8]]
LISTED = 100  # of each kind of finding, in the report; counts are always of all
SHEET_COLUMNS = 16
PAIRS_SHOWN = 32
SHEET_SIDE = 64  # larger images are shown this small on sheets
SHEETS_TOTAL = 1024  # images on all sheets together, where classes are many


def examine(
    source: Source,
    ingested: Ingested,
    kept: NDArray[np.int64],
    parts: NDArray[np.uint8],
    form: Form,
    near_bits: int,
) -> dict[str, Any]:
    """The report on a source: `kept` [K] are the good images' indices, `parts` [K] where each of them goes.

    Duplicates are those of the stored pixels, after crop and resize.
    """
    facts, labels = ingested.facts, source.labels[kept]
    names = [source.names[index] for index in kept]
    bad = [{"name": source.names[index], "reason": reason} for index, reason in sorted(ingested.bad.items())]
    bad += [{"name": name, "reason": reason} for name, reason in sorted(source.strays.items())]
    read = facts[facts["width"] > 0]
    sizes = Counter(f"{width}x{height}" for width, height in zip(read["width"], read["height"], strict=True))
    sides = np.minimum(read["width"], read["height"])
    turned = [names[at] for at in np.flatnonzero(facts["orientation"][kept] > 1)]
    return {
        "images": len(kept),
        "resolution": form.resolution,
        "channels": form.channels,
        "bad": {"count": len(bad), "files": bad},
        "modes": _ranked(Counter(mode.decode() for mode in read["mode"].tolist())),
        "sizes": {
            "distinct": len(sizes),
            "commonest": _ranked(sizes)[:LISTED],
            "smallest_side": int(sides.min(initial=2**31)) if len(sides) else 0,
            "largest_side": int(np.maximum(read["width"], read["height"]).max(initial=0)),
            "enlarged": int((sides[read["good"]] < form.resolution).sum()),
        },
        "exif_rotated": {"count": len(turned), "files": turned[:LISTED]},
        "duplicates": _duplicates(facts[kept], names, labels, parts, near_bits),
        "parts": {name: int((parts == code).sum()) for code, name in enumerate(PARTS)},
        "classes": _classes(source.classes, labels, parts),
        "imbalance": _imbalance(labels),
    }


def _ranked(counts: Counter[str]) -> list[dict[str, Any]]:
    return [{"name": name, "count": n} for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _classes(classes: tuple[str, ...], labels: NDArray[np.int64], parts: NDArray[np.uint8]) -> list[dict[str, Any]]:
    counts = np.zeros((len(classes), len(PARTS)), dtype=np.int64)
    if classes:
        np.add.at(counts, (labels, parts), 1)
    return [
        {"name": name, "images": int(row.sum()), **dict(zip(PARTS, row.tolist(), strict=True))}
        for name, row in zip(classes, counts, strict=True)
    ]


def _imbalance(labels: NDArray[np.int64]) -> float:
    """Images of the largest class over those of the smallest that has any."""
    _, counts = np.unique(labels, return_counts=True)
    return round(float(counts.max() / counts.min()), 4) if len(counts) else 1.0


def _duplicates(
    facts: NDArray[Any], names: list[str], labels: NDArray[np.int64], parts: NDArray[np.uint8], bits: int
) -> dict[str, Any]:
    groups = exact_groups(facts["digest"])
    repeats = np.concatenate([np.empty(0, dtype=np.int64), *(group[1:] for group in groups)])
    single = np.setdiff1d(np.arange(len(facts)), repeats)
    near = near_pairs(facts["hash"][single], parts[single], bits=bits, listed=LISTED)
    return {
        "exact": {
            "groups": len(groups),
            "repeats": len(repeats),
            "across_parts": sum(len(np.unique(parts[group])) > 1 for group in groups),
            "across_classes": sum(len(np.unique(labels[group])) > 1 for group in groups),
            "files": [[names[index] for index in group] for group in groups[:LISTED]],
        },
        "near": {
            "bits": bits,
            "pairs": near.count,
            "across_parts": near.across_parts,
            "complete": near.complete,
            "files": [
                {"first": names[single[first]], "second": names[single[second]], "bits": distance}
                for first, second, distance in near.nearest
            ],
        },
    }


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
