"""The Slurm job that this process runs in, as Slurm itself tells: its nodes and its end.

Snakemake's jobs keep their number alone of Slurm's variables, so `scontrol` is asked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime

from pipestill import status
from pipestill.errors import SurroundingsError
from pipestill.progress import warn
from pipestill.stopping import JOB_END

ANSWER = 30  # seconds in which the controller has to answer
PAUSES = (1.0, 5.0, 0.0)  # seconds after each question that was not answered
WANTED = {"NumNodes", "NodeList", "EndTime", "JobState"}


@dataclass(frozen=True)
class Job:
    """A job; `end` in Unix seconds where it has one."""

    number: str
    nodes: int
    listing: str  # of its nodes, as Slurm writes it: n[1-2]
    end: float | None

    def first_node(self) -> str:
        """The name of its first node. Raises SurroundingsError."""
        return _asked("show", "hostnames", self.listing).split()[0]


def current_job() -> Job | None:
    """The job that this process runs in; None where it runs in none. Raises SurroundingsError where Slurm is silent."""
    number = os.environ.get("SLURM_JOB_ID")
    if number is None or shutil.which("scontrol") is None:
        return None
    said = _asked("show", "job", "--oneliner", number)
    for line in said.splitlines():  # all of an array where this is the task that has the array's number
        facts = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if facts.get("JobId") == number and facts.keys() >= WANTED:
            ends = facts["EndTime"] if facts["JobState"] == "RUNNING" else "Unknown"  # an old shell's job has ended
            return Job(number, int(facts["NumNodes"].split("-")[0]), facts["NodeList"], _moment(ends))
    raise SurroundingsError(f"Slurm does not know job {number}, in which this runs")


def note_job() -> None:
    """Leaves the job's number and its end in the environment, for this process and those that it starts."""
    if status.JOB in os.environ or "SLURM_JOB_ID" not in os.environ:
        return
    os.environ[status.JOB] = os.environ["SLURM_JOB_ID"]
    try:
        job = current_job()
    except SurroundingsError as error:
        warn(f"{error}: its time limit is not known, so none is heeded")
        return
    if job is not None and job.end is not None:
        os.environ.setdefault(JOB_END, str(job.end))


def _asked(*question: str) -> str:
    """What scontrol answers; its controller may be away for a moment. Raises SurroundingsError."""
    why = ""
    for pause in PAUSES:
        try:
            return subprocess.run(
                ["scontrol", *question],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                check=True,
                timeout=ANSWER,
                env=os.environ | {"SLURM_TIME_FORMAT": "standard"},
            ).stdout
        except (subprocess.SubprocessError, OSError) as error:
            why = str(error)
            time.sleep(pause)
    raise SurroundingsError(f"scontrol {' '.join(question)} gives no answer: {why}")


def _moment(text: str) -> float | None:
    """Unix seconds of Slurm's local time; None for a job without a limit."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
