"""What the report on a dataset means for training and for metrics, in sentences, and what to do about it.

Pure: a function of the report and of how the split was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipestill.config import SplitParams
from pipestill.data.store import PARTS
from pipestill.userfiles import escaped

FEW = 10  # test images of a class; with fewer, one image changes its accuracy by more than 10 points
UNEVEN = 2.0  # times the images of the smallest class that the largest may have without a word
NAMED = 3  # classes in a sentence


def advice(report: dict[str, Any], split: SplitParams) -> list[str]:
    """Sentences on classes that are too small, imbalance, and images that are in several parts; none if all is well."""
    said = [*_small(report), *_uneven(report), *_across(report, split), *_off(report)]
    if report["transparent"]:
        said.append(
            f"{report['transparent']:,} images had transparent pixels; data.background is the colour behind them"
        )
    return said


def _small(report: dict[str, Any]) -> list[str]:
    classes, said = report["classes"], []
    for part, meaning in (
        ("validation", "choices made on the validation part do not consider them"),
        ("test", "metrics say nothing about them, and their samples make every distance worse"),
    ):
        lacking = [row for row in classes if row["images"] and not row[part]]
        if report["parts"][part] and lacking:
            said.append(f"{_named(lacking, 'images')} no {part} image: {meaning}; add images or merge classes")
    few = [row for row in classes if 0 < row["test"] < FEW]
    if few:
        said.append(
            f"{_named(few, 'test')} fewer than {FEW} test images: one image more or less changes the metrics "
            f"of such a class by {100 // max(row['test'] for row in few)} points or more"
        )
    return said


def _named(rows: Sequence[dict[str, Any]], what: str) -> str:
    """`2 classes (a: 1, b: 2) have`, the smallest first."""
    ordered = sorted(rows, key=lambda row: (row[what], row["name"]))
    shown = ", ".join(f"{escaped(row['name'])}: {row[what]}" for row in ordered[:NAMED])
    many = "class" if len(rows) == 1 else "classes"
    return f"{len(rows):,} {many} ({shown}{', …' if len(rows) > NAMED else ''}) {'has' if len(rows) == 1 else 'have'}"


def _uneven(report: dict[str, Any]) -> list[str]:
    filled = [row for row in report["classes"] if row["images"]]
    if report["imbalance"] <= UNEVEN or not filled:
        return []
    most, least = max(filled, key=lambda row: row["images"]), min(filled, key=lambda row: row["images"])
    return [
        f"the largest class ({escaped(most['name'])}, {most['images']:,} images) has {report['imbalance']:.3g} times "
        f"the images of the smallest ({escaped(least['name'])}, {least['images']:,}): distances describe mostly the "
        "large classes, and only samples of the same mix are comparable with the test images "
        "(sampling.shared.plan=data)"
    ]


def _across(report: dict[str, Any], split: SplitParams) -> list[str]:
    said, duplicates = [], report["duplicates"]
    exact, near = duplicates["exact"]["across_parts"], duplicates["near"]["across_parts"]
    drawn = split.by == "fraction"
    if exact:
        what = "set data.split.together=repeats" if drawn else "move them"
        said.append(f"{exact:,} groups of repeats lie in several parts, so that test images are trained on: {what}")
    if near:
        at = f"at most {duplicates['near']['bits']} bits apart"
        what = "data.split.together=near keeps them together" if drawn else "move those that show the same"
        said.append(f"{near:,} near pairs ({at}) lie in different parts; if they show the same thing, {what}")
    return said


def _off(report: dict[str, Any]) -> list[str]:
    """Parts that groups have made larger or smaller than they were to be."""
    together = report["together"]
    if together is None:
        return []
    parts = [
        f"{name} {report['parts'][name]:,} instead of {together['wanted'][name]:,}"
        for name in PARTS
        if report["parts"][name] != together["wanted"][name]
    ]
    if not parts:
        return []
    return [
        f"keeping {together['kept']} together (largest group: {together['largest']:,} images) "
        f"changes the parts: {', '.join(parts)}"
    ]
