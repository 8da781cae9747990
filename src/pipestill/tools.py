"""Calling DVC and Snakemake as a user would: as processes, with one clear line where they fail."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from pipestill import pipeline, started
from pipestill.errors import SurroundingsError
from pipestill.pipeline import Pipeline
from pipestill.stopping import STOPPED
from pipestill.work import scratch

SYNCING = "PIPESTILL_SYNCING"  # set for the Snakemake that sync starts, so that it does not call record
SYSTEM_ERROR = re.compile(r"\[Errno (\d+)\] (.*)")
QUIET = ("host", "progress", "reason", "rules")  # not "all", which leaves out errors as well


def put_on_path() -> None:
    """Lets this process's children find `pipestill` without an active virtual environment, and their own modules."""
    os.environ["PYTHONSAFEPATH"] = "1"  # a user's queue.py is not the standard library's
    place = str(Path(sys.executable).parent)
    if place not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([place, os.environ["PATH"]])


def dvc(root: Path, *arguments: str) -> None:
    """Runs a DVC command. Raises SurroundingsError with DVC's own last line."""
    _run([sys.executable, "-m", "dvc", *arguments], root)


def unrecorded(root: Path, addresses: Sequence[str]) -> list[str]:
    """Those stages whose recorded state in dvc.lock differs from what lies there."""
    with pipeline.dvc_stages(root, locked=True) as found:
        stages = {stage.name: stage for stage in found}
        return [address for address in addresses if stages[address].changed()]


def snakemake(stages: Pipeline, *arguments: str) -> None:
    """Runs Snakemake quietly on one core, with these stages. Raises SurroundingsError with its own message."""
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *arguments, "--quiet", *QUIET]
    _run(command, stages.root, **{SYNCING: "1", started.PARAMS: str(started.keep(stages.text, stages.dumped()))})


def _run(command: list[str], root: Path, **more: str) -> None:
    put_on_path()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        code = _call(command, root, os.environ | more, output)
        output.seek(0)
        said = output.read()
    if code:
        words = " ".join(word for word in command[2:] if not word.startswith("-"))
        raise SurroundingsError(f"{words[:60]} ended with {code}: {_reason(said)}")


def _call(command: list[str], root: Path, variables: Mapping[str, str], output: IO[str] | None = None) -> int:
    """Runs a command in a session of its own; its code. A stop signal interrupts it and all its children as Ctrl-C."""
    with subprocess.Popen(
        command, cwd=root, env=variables, stdout=output, stderr=output, start_new_session=True
    ) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGINT)
            process.wait()
            raise


def _reason(text: str) -> str:
    """What went wrong, from all that DVC or Snakemake said: an error of the system first, which has a remedy."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        if found := SYSTEM_ERROR.search(line):
            full = int(found[1]) in (errno.ENOSPC, errno.EDQUOT)
            return found[2] + (": free some space and start this again" if full else "")
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or ["it said nothing"])[0].removeprefix("ERROR: ")


def dvc_repro(root: Path, arguments: Sequence[str], variables: Mapping[str, str]) -> tuple[int, bool]:
    """Runs `dvc repro`, its output shown; returns its code and whether a stage stopped with its state saved."""
    with scratch("repro") as folder:
        note = folder / "stopped"
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *arguments]
        put_on_path()
        own = {STOPPED: str(note), **variables}
        code = _call(command, root, os.environ | own)
        return code, note.exists()


def commit(stages: Pipeline, addresses: Sequence[str]) -> None:
    """Lets DVC commit these stages with the parameters that they were resolved with, or none of them.

    Raises SurroundingsError.
    """
    before = pipeline.recorded(stages.root)
    meant = {stage.address: stage.parameters for stage in stages.stages}
    try:
        dvc(stages.root, "--wait-for-lock", "commit", "--force", *addresses)
    finally:  # a commit that failed or was interrupted may have recorded the first ones
        now = pipeline.recorded_parameters(stages.root)
        changed = any(now.get(address) != meant[address] for address in addresses)
        if changed:
            pipeline.record_again(stages.root, {address: before.get(address) for address in addresses})
    if changed:
        raise SurroundingsError("params.yaml changed while DVC was recording: nothing was recorded, start this again")
