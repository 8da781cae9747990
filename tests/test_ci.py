"""What conftest.py makes of skipped tests where PIPESTILL_CI=1 says that nothing may be missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.fixture
def browser():
    pytest.skip("no browser here")

def test_of_nothing(): pass

def test_of_a_page(browser): pass

@pytest.mark.skipif(True, reason="no cluster here")
def test_of_a_cluster(): pass

@pytest.mark.skipif(True, reason="no mount namespace here")
def test_of_a_full_disk(): pass

@pytest.mark.skipif(True, reason="no GPU here")
def test_on_a_gpu(): pass

@pytest.mark.xfail(reason="known")
def test_of_what_is_known(): assert False

def test_of_a_tracker(): pytest.importorskip("no_such_module")
"""
MODULE = "import pytest; pytest.importorskip('no_such_module')"


@pytest.mark.parametrize("workers", [[], ["--numprocesses", "1"]], ids=["alone", "in a worker"])
def test_only_what_cannot_be_installed_may_be_missing(tmp_path: Path, workers: list[str]) -> None:
    for name in ("some", "others"):
        (tmp_path / name).mkdir()
        for needed in ("conftest.py", "forked.py"):
            shutil.copy(Path(__file__).parent / needed, tmp_path / name)
    (tmp_path / "some" / "test_some.py").write_text(TESTS)
    (tmp_path / "others" / "test_others.py").write_text(MODULE)
    sound = {"test_of_nothing": "PASSED", "test_of_what_is_known": "XFAIL"}
    failed = {"test_of_a_page": "ERROR", "test_of_a_cluster": "ERROR", "test_of_a_tracker": "FAILED"}
    assert outcomes(tmp_path / "some", "0", *workers) == (sound, 5)
    assert outcomes(tmp_path / "some", "1", *workers) == (sound | failed, 2)
    assert outcomes(tmp_path / "others", "0", *workers) == ({}, 1)
    assert outcomes(tmp_path / "others", "1", *workers) == ({"test_others.py": "ERROR"}, 0)


def outcomes(folder: Path, ci: str, *arguments: str) -> tuple[dict[str, str], int]:
    """What pytest says of each test that was not skipped, and how many were."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", *arguments, "."],
        cwd=folder,
        env=os.environ | {"PIPESTILL_CI": ci},
        capture_output=True,
        text=True,
        check=False,
    )
    told = re.findall(r"^(PASSED|XFAIL|ERROR|FAILED) (?:\w+\.py::)?([\w.]+)", done.stdout, flags=re.MULTILINE)
    return {name: word for word, name in told}, done.stdout.count("\nSKIPPED [1]")
