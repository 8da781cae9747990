"""Snakemake, DVC and stages by hand in any order with small changes between them (tests/interleaving.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from interleaving import interleave
from workflow_project import Project


@pytest.mark.timeout(600)
def test_three_rounds(tiny: Project, tmp_path: Path) -> None:
    """By hand up to one run's samples; another rate by Snakemake; back to the first values by DVC, which has them."""
    interleave(tiny, tmp_path, seed=473, rounds=3)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [100, 101, 102])
def test_thirty_rounds(tiny: Project, tmp_path: Path, seed: int) -> None:
    interleave(tiny, tmp_path, seed=seed, rounds=10)
