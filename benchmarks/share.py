"""Seconds to share results through a DVC remote, step by step: push, clone, pull, sync, and finding nothing to do.

    python benchmarks/share.py --output runs/benchmarks/share.json

The project is the miniature (experiment=miniature) in a temporary folder, run once to its end; `--project` takes a
finished one instead. The remotes are a folder and an S3 store (moto's server on this machine). Pushing and pulling what
is new is transfer; the sum is of everything else, with a push and a pull that have nothing to move among it. Ends with
1 where the clone is not the same or has anything to do.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from s3_server import S3Server
from workflow_project import Project, make_project

TRANSFER = ("dvc push", "dvc pull")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, metavar="DIR", help="a finished project, instead of making one")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pipestill-benchmark-") as folder:
        project = Project(options.project.absolute()) if options.project else finished_project(Path(folder) / "project")
        figures = {"a folder": share(project, Path(folder) / "local", remote=str(Path(folder) / "store"))}
        with S3Server() as server:
            figures["an S3 store"] = share(project, Path(folder) / "s3", server=server)
    show(figures)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def finished_project(root: Path) -> Project:
    project = make_project(root, "experiment=miniature")
    project.snakemake()
    project.commit("results")
    return project


def share(
    finished: Project, folder: Path, *, remote: str | None = None, server: S3Server | None = None
) -> dict[str, float]:
    """Pushes a copy of a finished project, brings it to a clone, and looks for work there: seconds by step."""
    seconds: dict[str, float] = {}

    def timed(step: str, work: Callable[[], str]) -> str:
        begun = time.perf_counter()
        said = work()
        seconds[step] = round(time.perf_counter() - begun, 2)
        return said

    variables: Mapping[str, str] = server.environment if server else {}
    origin, clone = finished.copy(folder / "origin"), Project(folder / "clone")
    origin.dvc("remote", "add", "--default", "store", server.remote if server else str(remote))
    if server:
        origin.dvc("remote", "modify", "store", "endpointurl", server.address)
    origin.commit("where artefacts are kept")

    def at(project: Project, *command: str) -> Callable[[], str]:
        return lambda: project.run(*command, **variables)

    timed("dvc push", at(origin, "dvc", "push"))
    timed("dvc push, nothing new", at(origin, "dvc", "push"))
    timed("git clone", at(origin, "git", "clone", "--quiet", str(origin.root), str(clone.root)))
    timed("dvc pull", at(clone, "dvc", "pull"))
    timed("dvc pull, nothing new", at(clone, "dvc", "pull"))
    timed("pipestill sync", at(clone, "pipestill", "sync"))
    planned = timed("snakemake, nothing to do", at(clone, "snakemake", "--profile", "local", "-n"))
    status = timed("dvc status", at(clone, "dvc", "status"))
    recorded = timed("pipestill record", at(clone, "pipestill", "record"))
    same = clone.payloads() == origin.payloads() != {}
    idle = "Nothing to be done" in planned and "up to date" in status and "finished stages are recorded" in recorded
    if not same or not idle or clone.git("status", "--porcelain"):
        sys.exit(f"the clone is not the same, or has something to do:\n{planned}\n{status}\n{recorded}")
    return seconds


def besides_transfer(seconds: Mapping[str, float]) -> float:
    return round(sum(value for step, value in seconds.items() if step not in TRANSFER), 2)


def show(figures: Mapping[str, Mapping[str, float]]) -> None:
    steps = list(next(iter(figures.values())))
    print(f"| step ({len(os.sched_getaffinity(0))} cores) | {' | '.join(figures)} |")
    print(f"| --- |{' ---: |' * len(figures)}")
    for step in steps:
        print(f"| {step} | {' | '.join(f'{found[step]:.1f}' for found in figures.values())} |")
    print(
        f"| all but {' and '.join(TRANSFER)} | {' | '.join(f'{besides_transfer(s):.1f}' for s in figures.values())} |"
    )


if __name__ == "__main__":
    main()
