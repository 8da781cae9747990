"""Check this installation and this project: one line for each thing, ok, warn or fail, and what to do.

Digests of all artefacts are recomputed, which takes as long as reading them; --quick compares sizes alone. Exits with
3 where anything failed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from pipestill import __version__, artifacts, config, configure, outputs, pipeline
from pipestill.errors import PipestillError, SurroundingsError
from pipestill.progress import is_quiet
from pipestill.stages.fetch import INBOX
from pipestill.standing import Standing, open_any, texts
from pipestill.terminal import coloured
from pipestill.work import runs_root

EXAMPLES = """\
  pipestill doctor
  pipestill doctor --quick
"""
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
GIGABYTE = 1024**3
EXTRAS = {
    "workflow": "snakemake and dvc repro",
    "s3": "DVC remotes in an S3 store",
    "tracking": "operation.trackers",
    "dev": "make test",
}
PROGRAMS = {  # program: (Debian's package, what needs it)
    "git": ("git", "DVC and Snakemake"),
    "chromium": ("chromium", "the tests of the report in a browser"),
}


class Line(NamedTuple):
    """One finding: ok, warn or fail; and what to do where it is not ok."""

    state: str
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="compare sizes of artefacts' files, not digests")


def main(options: argparse.Namespace) -> None:
    root = Path.cwd()
    checks: list[Callable[[], Iterator[Line]]] = [
        python,
        packages,
        devices,
        lambda: machine(root),
        programs,
        lambda: project(root),
        lambda: parameters(root),
        lambda: experiments(root),
        lambda: metrics(root),
        work_in_progress,
        lambda: stages(root, quick=options.quick),
    ]
    failed = 0
    for check in checks:
        for line in check():
            if line.state != "ok" or not is_quiet():
                print(f"{coloured(f'{line.state:<4}', COLOURS[line.state], sys.stdout)}  {line.text}", flush=True)
            failed += line.state == "fail"
    if failed:
        raise SurroundingsError(f"{failed} {'check' if failed == 1 else 'checks'} failed: see above")


def python() -> Iterator[Line]:
    version = ".".join(map(str, sys.version_info[:3]))
    fits = sys.version_info >= (3, 11)
    yield Line("ok" if fits else "fail", f"Python {version}" + ("" if fits else ": 3.11 or newer is needed"))
    yield Line("ok", f"pipestill {__version__}, parameters from {configure.conf_folder()}")


def packages() -> Iterator[Line]:
    """Whether what pipestill requires is installed, in versions that it takes, and its extras."""
    from packaging.requirements import Requirement

    required = [Requirement(text) for text in metadata.requires("pipestill") or []]
    bad = [problem for item in required if item.marker is None and (problem := _package_problem(item))]
    state, text = (
        ("fail", f"packages: {', '.join(bad)}: pip install -r requirements.txt") if bad else ("ok", "packages")
    )
    yield Line(state, text)
    for extra, purpose in EXTRAS.items():
        own = [item for item in required if item.marker is not None and item.marker.evaluate({"extra": extra})]
        bad = [problem for item in own if (problem := _package_problem(item))]
        if bad:
            yield Line("warn", f"extra {extra} ({purpose}): {', '.join(bad)}: pip install 'pipestill[{extra}]'")
        else:
            yield Line("ok", f"extra {extra} ({purpose})")
    yield from _pins(Path("requirements.txt"))


def _package_problem(requirement: object) -> str | None:
    name, specifier = requirement.name, requirement.specifier  # type: ignore[attr-defined]
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is missing"
    return None if specifier.contains(version, prereleases=True) else f"{name} {version} is not {specifier}"


def _pins(path: Path) -> Iterator[Line]:
    if not path.exists():
        return
    pins = dict(line.split("==") for line in path.read_text(encoding="utf-8").split() if "==" in line)
    other = []
    for name, version in pins.items():
        try:
            if metadata.version(name) != version:
                other.append(f"{name} {metadata.version(name)} (not {version})")
        except metadata.PackageNotFoundError:
            continue
    if other:
        yield Line("warn", f"other versions than in {path}: {', '.join(other)}: figures may differ; make .venv anew")
    else:
        yield Line("ok", f"versions as in {path}")


def devices() -> Iterator[Line]:
    try:
        import torch
    except ImportError:
        return  # named among the packages
    count = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
    yield Line(
        "ok", f"torch {torch.__version__}, {f'{count} GPUs ({names})' if count else 'no GPU: it runs on the CPU'}"
    )


def machine(root: Path) -> Iterator[Line]:
    yield Line("ok", f"{len(os.sched_getaffinity(0))} cores")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIGABYTE
    enough = memory >= 4
    yield Line("ok" if enough else "warn", f"{memory:.1f} GB memory" + ("" if enough else ": the demo takes about 4"))
    for label, folder in {"project": root, "work in progress": runs_root()}.items():
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(there).free / GIGABYTE
        state = "ok" if free >= 5 else "warn" if free >= 0.5 else "fail"
        yield Line(state, f"{free:.1f} GB free for {label} ({there})" + ("" if state == "ok" else ": free some space"))
        if not os.access(there, os.W_OK):
            yield Line("fail", f"{there} cannot be written: mend its rights, or set PIPESTILL_RUNS")


def programs() -> Iterator[Line]:
    for program, (package, purpose) in PROGRAMS.items():
        if shutil.which(program):
            yield Line("ok", f"{program} ({purpose})")
        else:
            yield Line("warn", f"no {program} ({purpose}): apt-get install {package}")


def project(root: Path) -> Iterator[Line]:
    try:
        stages = pipeline.load(root)
    except PipestillError as error:
        yield Line("fail", str(error))
        return
    yield Line("ok", f"dvc.yaml resolves to {len(stages.stages)} stages in a git checkout")
    if (root / ".snakemake" / "locks").is_dir() and any((root / ".snakemake" / "locks").iterdir()):
        yield Line("warn", "Snakemake's lock is held: wait for that run, or snakemake --unlock if it was killed")


def experiments(root: Path) -> Iterator[Line]:
    """Inputs that DVC's queue would not find: its experiments run in copies of what git and DVC track."""
    if shutil.which("git") is None:
        return  # said among the programs
    try:
        stages = pipeline.load(root)
        stated = {os.path.normpath(text) for text in texts(config.parse_yaml(stages.text))}
    except PipestillError:
        return  # said above
    outside = {path for stage in stages.stages for path in stage.inputs if not stages.sources(path)}
    if stages.named("fetch"):
        outside.add(str(INBOX))
    for path in sorted(outside):
        stated_from_root = str((root / path).absolute()) in stated  # that an experiment finds as well
        if not stated_from_root and (root / path).exists() and not _is_tracked(root, path):
            yield Line(
                "warn",
                f"{path} is not tracked by git or DVC: dvc exp run --queue and --temp will not find it; "
                f"run dvc add {shlex.quote(path)} and commit {path}.dvc, or give an absolute path",
            )


def _is_tracked(root: Path, path: str) -> bool:
    if any(Path(root, f"{place}.dvc").is_file() for place in (path, *map(str, Path(path).parents))):
        return True
    words = ["git", "ls-files", "--", path]
    return bool(subprocess.run(words, cwd=root, capture_output=True, check=False).stdout)


def parameters(root: Path) -> Iterator[Line]:
    path = root / "params.yaml"
    if not path.exists():
        yield Line("warn", "no params.yaml here: stages take the packaged demo; write one with pipestill config")
        return
    try:
        config.load(path, whole=True)
    except PipestillError as error:
        yield Line("fail", str(error))
        return
    edited = configure.edited(path.read_text(encoding="utf-8"))
    yield Line("ok", "params.yaml is in order" + (", with edits by hand" if edited else ""))


def metrics(root: Path) -> Iterator[Line]:
    """Metrics files that another experiment left."""
    from pipestill.reporting.table import strays

    try:
        found = [file for file in strays(root / "metrics") if outputs.METRICS.recognises(file)]
        others = [str(file.relative_to(root)) for file in found]
    except PipestillError:
        return  # said above
    if others:
        yield Line(
            "warn", f"tables leave out runs that params.yaml does not name: {', '.join(others)}: pipestill clean"
        )


def work_in_progress() -> Iterator[Line]:
    states = sorted(path for path in runs_root().glob("*/*/state") if any(path.iterdir()))
    if states:
        size = sum(file.stat().st_size for state in states for file in state.rglob("*") if file.is_file())
        yield Line(
            "ok",
            f"{len(states)} pieces of unfinished work ({size / GIGABYTE:.2f} GB) under {runs_root()}: "
            "the same command goes on from there; pipestill clean removes what no command needs",
        )


def stages(root: Path, *, quick: bool) -> Iterator[Line]:
    """The standing of every artefact."""
    try:
        resolved = pipeline.load(root)
        standing = Standing(resolved)
        _ = standing.params
    except PipestillError:
        return  # said above
    waiting = [stage.address for stage in resolved.stages if standing.missing(stage)]
    for path, reader in resolved.absent().items():
        yield Line("warn", f"{path}, which {reader} reads, does not exist, and no stage makes it: put it there")
    sound = []
    for stage in resolved.stages:
        if standing.missing(stage):
            continue
        problem = standing.problem(stage)
        if problem is not None:
            yield Line("warn", f"{stage.address}: {problem}: run it")
            continue
        try:
            if not quick:
                artifacts.verify(open_any(root / stage.output))
        except PipestillError as error:
            yield Line("fail", f"{stage.address}: {error}")
            continue
        sound.append(stage.address)
    if sound:
        yield Line("ok", f"{len(sound)} artefacts stand{' and verify' if not quick else ''}")
    if waiting:
        yield Line("ok", f"{len(waiting)} stages have not run: snakemake --profile local, or dvc repro")
    for name in sorted({name for stage in resolved.stages for name in resolved.strangers(stage)}):
        yield Line("warn", f"{name} belongs to no stage any more, and DVC counts it among inputs: pipestill clean")
    if sound:
        from pipestill import tools

        new = tools.unrecorded(root, sound)
        if new:
            yield Line("warn", f"not recorded by DVC: {', '.join(new)}: pipestill record")
        else:
            yield Line("ok", "DVC has recorded what stands")
