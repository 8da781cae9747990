# What the terminal shows of a run, beside the stages' own lines. Snakemake's log file has everything.
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

from pipestill import config as parameters_file
from pipestill import logs, started, tools
from pipestill.errors import InputError, PipestillError

HIDDEN = re.compile(
    r"RuleException:\n.*attempt\.sh"  # the stage's own message follows at the end
    r"|Exiting because a job execution failed"
    r"|Select jobs to execute|Execute \d+ jobs",
    re.DOTALL,
)
PATIENCE = 120  # seconds after which a run begins without an estimate
LONG = {"reference", "train", "tune", "distill", "sample"}  # rules whose time is worth a few seconds of measuring
RESTART = re.compile(r"Trying to restart job (\d+)")


def ended_since(place):
    """How the last attempt at a stage ended, if that was in this run."""
    ended = logs.last(place)
    return ended if ended is not None and ended.time >= BEGUN else None


def is_shown(record):
    """Whether the terminal shows a line of Snakemake's: not what only repeats that a stage failed."""
    text = str(record.msg)
    if HIDDEN.match(text):
        return False
    job = RESTART.match(text)
    files = (
        [file for one in workflow.dag.jobs if workflow.dag.jobid(one) == int(job[1]) for file in one.log] if job else []
    )
    if str(getattr(record, "event", "")).endswith("JOB_ERROR"):
        files = getattr(record, "log", None) or []
    ended = [ended_since(Path(str(file).removesuffix(".log"))) for file in files]
    return not any(each is not None and each.code == InputError.exit_code for each in ended)


if workflow.is_main_process:
    for handler in logging.getLogger("snakemake.logging").handlers:
        if handler.name == "DefaultStreamHandler":
            handler.addFilter(is_shown)


def say_how_long():
    """How long the jobs of this run will take, if this machine is to do them and any of them takes long."""
    jobs = [(job.rule.name, job.wildcards.get("name")) for job in workflow.dag.needrun_jobs()]
    wanted = [f"{stage}@{entry}" if entry else stage for stage, entry in jobs if stage != "all"]
    here = workflow.is_main_process and workflow.local_exec and os.environ.get("PIPESTILL_ESTIMATE") != "0"
    runs = not workflow.touch and tools.SYNCING not in os.environ  # this is called when files are touched, too
    if here and runs and LONG & {stage for stage, _ in jobs}:
        command = [sys.executable, "-m", "pipestill", "config", "--estimate", "--stages", *wanted]
        try:
            subprocess.run(command, stdout=sys.stderr, check=False, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            print("how long this will take is not known: measuring took too long", file=sys.stderr)


def say_what_changed():
    """Names parameters that were edited while this ran: the run did not use them."""
    try:
        now = parameters_file.parse_yaml((ROOT / started.FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, PipestillError) as error:
        print(f"params.yaml can no longer be read: {error}", file=sys.stderr)
        return
    found = list(started.differences(parameters_file.parse_yaml(STAGES.text), now))
    if found:
        said = (
            f"params.yaml changed during this run, which kept the values that it started with: {started.listed(found)}"
        )
        print(f"{said}: run snakemake again to apply them", file=sys.stderr)


def say_what_failed():
    """The last line of each stage that failed in this run, once, at the end."""
    places = {path.parent: ended_since(path.parent) for path in Path(RUNS, "logs").glob("*/*/outcome")}
    failed = {place: ended for place, ended in places.items() if ended is not None and ended.code}
    for place, ended in sorted(failed.items(), key=lambda item: item[1].time):
        name = f"{place.parent.name} {place.name}".removesuffix(" all")
        print(f"{name} ended with {ended.code}: {ended.said}", file=sys.stderr)
