"""Linters and the type checker, as CI sees them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECKS = {
    "ruff check": ("ruff", "check", "--no-cache"),
    "ruff format": ("ruff", "format", "--no-cache", "--check"),
    "mypy": ("mypy",),
    "snakefmt": ("snakefmt", "--check", "Snakefile", "workflow"),
    "snakemake --lint": ("snakemake", "--lint"),
}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.timeout(600)
def test_clean(name: str) -> None:
    program, *arguments = CHECKS[name]
    done = subprocess.run(
        [Path(sys.executable).parent / program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
