"""Seconds until a command that has nothing to do is back, beside what the interpreter and the tools cost by themselves.

    python benchmarks/startup.py --output runs/benchmarks/startup.json

The project is the miniature (experiment=miniature) in a temporary folder, run once to its end; `--project` takes a
finished one instead. Each figure is the median of `--repeats` rounds in which the commands take turns, as processes
with files in the page cache; the first round is thrown away. The ratio is to the row that a group names first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from workflow_project import make_project

PROFILE = ("snakemake", "--profile", "local")
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "command line": {
        "python -c pass": ("python", "-c", "pass"),
        "python -c 'import torch'": ("python", "-c", "import torch"),
        "pipestill --help": ("pipestill", "--help"),
        "pipestill distill --help": ("pipestill", "distill", "--help"),
        "pipestill config --check": ("pipestill", "config", "--check"),
    },
    "snakemake": {
        "snakemake --version": ("snakemake", "--version"),
        "snakemake --profile local, nothing to do": PROFILE,
        "the same with --dry-run": (*PROFILE, "--dry-run"),
    },
    "dvc": {
        "dvc --version": ("dvc", "--version"),
        "dvc repro, nothing to do": ("dvc", "repro"),
        "dvc status": ("dvc", "status"),
    },
    "pipestill with DVC's graph": {
        "dvc --version": ("dvc", "--version"),
        "pipestill record, nothing to do": ("pipestill", "record"),
        "pipestill trace metrics/student-4.json": ("pipestill", "trace", "metrics/student-4.json"),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--project", type=Path, metavar="DIR", help="a finished project, instead of making one")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    output = options.output.absolute() if options.output else None
    with tempfile.TemporaryDirectory(prefix="pipestill-benchmark-") as folder:
        project = options.project or finished_project(Path(folder) / "project")
        seconds = measure(project.absolute(), options.repeats)
    for group, commands in GROUPS.items():
        show(group, {name: seconds[name] for name in commands})
    if output:
        figures = {
            "cores": len(os.sched_getaffinity(0)),
            "repeats": options.repeats,
            "seconds": {name: round(found, 3) for name, found in seconds.items()},
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def finished_project(root: Path) -> Path:
    project = make_project(root, "experiment=miniature")
    project.snakemake()
    project.commit("results")
    finished: Path = project.root
    return finished


def measure(root: Path, repeats: int) -> dict[str, float]:
    """Median seconds of each command, run in `root`."""
    commands = {name: command for group in GROUPS.values() for name, command in group.items()}
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for lap in range(repeats + 1):
        for name, command in commands.items():
            seconds = timed(command, root)
            if lap:
                taken[name].append(seconds)
    return {name: statistics.median(values) for name, values in taken.items()}


def timed(command: tuple[str, ...], root: Path) -> float:
    """Seconds of one process. It must succeed, and start no stage."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    started = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=root,
        env=os.environ | {"PATH": path},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    seconds = time.perf_counter() - started
    said = done.stdout + done.stderr
    if done.returncode or "Running stage" in said or "rule " in said:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}, or had something to do:\n{said[-2000:]}")
    return seconds


def show(group: str, seconds: dict[str, float]) -> None:
    first = next(iter(seconds))
    print(f"\n| {group} | seconds | against {first} |\n| --- | ---: | ---: |")
    for name, value in seconds.items():
        print(f"| {name} | {value:.3f} | {value / seconds[first]:.1f} |")


if __name__ == "__main__":
    main()
