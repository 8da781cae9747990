"""Runs the pipeline that params.yaml describes, then prints its results and where the report is."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

from pipestill.durations import duration
from pipestill.work import runs_root

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def main() -> int:
    if shutil.which("git") is None:
        print("make demo: git is missing, and DVC and Snakemake need it: install git", file=sys.stderr)
        return 3
    if not (ROOT / ".git").exists():
        print(
            f"make demo: {ROOT} is no git checkout, and DVC and Snakemake need one: clone the repository, "
            "or run git init && git add -A here",
            file=sys.stderr,
        )
        return 2
    started = time.monotonic()
    profile = ["--profile", "local"]
    code = subprocess.run([BIN / "snakemake", *profile], cwd=ROOT, check=False).returncode
    if code:
        print("make demo: the pipeline stopped; start it again to go on from there", file=sys.stderr)
        return code
    seconds = time.monotonic() - started
    full = (ROOT / runs_root() / "report" / "index.html").resolve()
    print(flush=True)
    subprocess.run([BIN / "pipestill", "report", "--print-table", "metrics"], cwd=ROOT, check=True)
    print(f"\nthe pipeline took {duration(seconds)}; the report: {ROOT / 'artifacts' / 'report' / 'index.html'}")
    if full.exists():
        print(f"the report with this machine's times and previews: {full}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
