"""Compares what this machine made with what is committed: the digests in dvc.lock, and the metrics.

    make demo && python scripts/reproduced.py

Exits with 1 if more differs than docs/reproducibility.md allows. Needs git, and a pipeline that ran to its end.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
SAME_EVERYWHERE = ("example", "fetch", "dataset", "convert")  # stages without floating-point sums
DIGITS = 2  # to which metrics agree on another machine

Lock = Mapping[str, Mapping[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="the checkout")
    parser.add_argument("--against", default="HEAD", metavar="REVISION", help="what to compare with (HEAD)")
    options = parser.parse_args()
    committed, here = committed_lock(options.root, options.against), lock(options.root)
    changed = other_work(committed, here)
    if changed:
        print(f"not the same pipeline: commands or parameters of {', '.join(changed)} differ")
        return 1
    differ = different_stages(committed, here)
    moved = [stage for stage in differ if stage.partition("@")[0] in SAME_EVERYWHERE]
    print(f"{len(here) - len(differ)} of {len(here)} stages made the same bytes", end="")
    print(f"; not {', '.join(differ)}" if differ else "")
    lost = other_metrics(options.root, options.against)
    if lost:
        print(f"metrics only here or only in {options.against}: {', '.join(lost)}")
        return 1
    worst, where = worst_metric(options.root, options.against)
    print(f"metrics agree to {digits(worst)} significant digits" if worst else "metrics are equal", end="")
    print(f" (relative difference of {where}: {worst:.2g})" if worst else "")
    if moved:
        print(f"{', '.join(moved)} should be the same on every machine")
    return int(bool(moved) or digits(worst) < DIGITS)


def committed_lock(root: Path, revision: str) -> Lock:
    found: Lock = yaml.safe_load(_git(root, "show", f"{revision}:./dvc.lock"))["stages"]
    return found


def lock(root: Path) -> Lock:
    found: Lock = yaml.safe_load((root / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    return found


def other_work(first: Lock, second: Lock) -> list[str]:
    """Stages that only one of two locks has, or whose commands or parameters differ."""
    asked = ("cmd", "params")
    return [
        stage
        for stage in sorted({*first, *second})
        if any(first.get(stage, {}).get(key) != second.get(stage, {}).get(key) for key in asked)
    ]


def different_stages(first: Lock, second: Lock) -> list[str]:
    """Stages whose outputs differ between two locks."""
    return [stage for stage in second if first[stage].get("outs") != second[stage].get("outs")]


def other_metrics(root: Path, revision: str) -> list[str]:
    """Metrics files that are only here, or only in the revision."""
    committed = _git(root, "ls-tree", "--name-only", revision, "metrics/").split()
    here = [f"metrics/{file.name}" for file in (root / "metrics").glob("*.json")]
    return sorted({name for name in committed if name.endswith(".json")} ^ set(here))


def worst_metric(root: Path, revision: str) -> tuple[float, str]:
    """The largest relative difference between a committed metric and the present one, and where it is."""
    worst, where = 0.0, ""
    for file in sorted((root / "metrics").glob("*.json")):
        before = json.loads(_git(root, "show", f"{revision}:./metrics/{file.name}"))
        for key, old, new in _pairs(before, json.loads(file.read_text(encoding="utf-8"))):
            difference = abs(new - old) / (max(abs(new), abs(old)) or 1.0)
            if difference > worst:
                worst, where = difference, f"{file.stem} {key}"
    return worst, where


def _pairs(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, float) and isinstance(new, float):
            yield key, old, new
        elif old != new and key != "counts":
            yield key, 0.0, 1.0


def digits(difference: float) -> int:
    """To how many significant digits two numbers with this relative difference agree."""
    return max(0, math.floor(1 - math.log10(2 * difference))) if difference else 16


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=True, encoding="utf-8").stdout


if __name__ == "__main__":
    raise SystemExit(main())
