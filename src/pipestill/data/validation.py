"""What a careful person would look at before training on images, as one report.

The report is a function of the images, their labels and the split: no date, no place.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipestill.config import DataParams
from pipestill.data.advice import advice
from pipestill.data.complaints import grouped
from pipestill.data.division import LISTED, Division, crossing
from pipestill.data.duplicates import exact_groups, near_pairs
from pipestill.data.ingest import Ingested
from pipestill.data.source import Source
from pipestill.data.store import PARTS
from pipestill.data.transforms import Form


def examine(
    source: Source,
    ingested: Ingested,
    kept: NDArray[np.int64],
    division: Division,
    data: DataParams,
) -> dict[str, Any]:
    """The report on a source: `kept` [K] are the good images' indices, `division` says where each of them goes.

    Duplicates are those of the stored pixels, after crop and resize.
    """
    facts, labels, parts, form = ingested.facts, source.labels[kept], division.parts, Form.of(data)
    names = [source.names[index] for index in kept]
    bad = [{"name": source.names[index], "reason": reason} for index, reason in sorted(ingested.bad.items())]
    bad += [{"name": name, "reason": reason} for name, reason in sorted(source.strays.items())]
    read = facts[facts["width"] > 0]
    sizes = Counter(f"{width}x{height}" for width, height in zip(read["width"], read["height"], strict=True))
    sides = np.minimum(read["width"], read["height"])
    turned = [names[at] for at in np.flatnonzero(facts["orientation"][kept] > 1)]
    report = {
        "images": len(kept),
        "resolution": form.resolution,
        "channels": form.channels,
        "bad": {"count": len(bad), "faults": grouped(bad), "files": bad},
        "transparent": int(facts["transparent"][kept].sum()),
        "modes": _ranked(Counter(mode.decode() for mode in read["mode"].tolist())),
        "sizes": {
            "distinct": len(sizes),
            "commonest": _ranked(sizes)[:LISTED],
            "smallest_side": int(sides.min(initial=2**31)) if len(sides) else 0,
            "largest_side": int(np.maximum(read["width"], read["height"]).max(initial=0)),
            "enlarged": int((sides[read["good"]] < form.resolution).sum()),
        },
        "exif_rotated": {"count": len(turned), "files": turned[:LISTED]},
        "duplicates": _duplicates(facts[kept], names, labels, division, data.near_duplicate_bits),
        "together": division.together,
        "parts": {name: int((parts == code).sum()) for code, name in enumerate(PARTS)},
        "classes": _classes(source.classes, labels, parts),
        "empty_classes": [name for number, name in enumerate(source.classes) if not (labels == number).any()],
        "imbalance": _imbalance(labels),
    }
    return report | {"advice": advice(report, data.split)}


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
    facts: NDArray[Any], names: list[str], labels: NDArray[np.int64], division: Division, bits: int
) -> dict[str, Any]:
    parts = division.parts
    groups = exact_groups(facts["digest"])
    repeats = np.concatenate([np.empty(0, dtype=np.int64), *(group[1:] for group in groups)])
    single = np.setdiff1d(np.arange(len(facts)), repeats)
    near = division.near or near_pairs(facts["hash"][single], parts[single], bits=bits, listed=LISTED)
    chains = np.bincount(near.groups) if len(single) else np.zeros(1, dtype=np.int64)
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
            "groups": int((chains > 1).sum()),
            "largest_group": int(chains.max()),
            "groups_across_parts": crossing(near.groups, parts[single]),
            "complete": near.complete,
            "files": [
                {"first": names[single[first]], "second": names[single[second]], "bits": distance}
                for first, second, distance in near.nearest
            ],
        },
    }
