"""Which stages are done, running, stopped or failed: on which job, at what step and rate, how long still, and why not.

It reads artefacts, and what stages leave below $PIPESTILL_RUNS, on whatever machine they run; it asks no scheduler. A
stage that has not been heard of for a minute is called lost.
"""

from __future__ import annotations

import argparse
import csv
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipestill import artifacts, logs, pipeline, project, status
from pipestill.arguments import is_number, seconds
from pipestill.durations import duration
from pipestill.errors import InputError
from pipestill.pipeline import Pipeline, Stage
from pipestill.previews import previews_of
from pipestill.standing import Standing
from pipestill.stopping import Interrupted
from pipestill.terminal import coloured
from pipestill.work import runs_root

EXAMPLES = """\
  pipestill status
  pipestill status --watch
  pipestill status --benchmarks
  pipestill status --json | jq '.[] | select(.state == "failed")'
"""
COLOURS = {"done": "green", "running": "blue", "stopped": "yellow", "lost": "red", "failed": "red"}
NAMED = 3  # stages that another waits for are named, the others are counted
FUTILE = 2  # attempts in a row that saved nothing, after which attempt.sh makes no further ones


def add_arguments(parser: argparse.ArgumentParser) -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="for programs")
    how.add_argument("--benchmarks", action="store_true", help="seconds, memory and load of each rule's finished jobs")
    how.add_argument(
        "--watch",
        type=seconds,
        nargs="?",
        const=10.0,
        metavar="SECONDS",
        help="look again every SECONDS (10 if not given), until nothing is left to do",
    )


def main(options: argparse.Namespace) -> None:
    if options.benchmarks:
        print("\n".join(benchmark_lines(runs_root())))
        return
    if options.watch is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            _watch(options.watch, options.stood)
        except Interrupted:
            raise
        except KeyboardInterrupt:  # Ctrl-C is how a watch ends
            pass
        return
    found = look(pipeline.load(Path.cwd()), runs_root())
    if options.json:
        print(json.dumps([asdict(row) for row in found], indent=1))
    else:
        print("\n".join(lines(found, options.stood)))


def _watch(every: float, stood: Path) -> None:
    """Shows the table anew, until all stages are done."""
    while True:
        found = look(pipeline.load(Path.cwd()), runs_root())
        if sys.stdout.isatty():
            print("\x1b[2J\x1b[H", end="")
        print("\n".join(lines(found, stood)), flush=True)
        if all(row.state == "done" for row in found):
            return
        time.sleep(every)


@dataclass(frozen=True)
class Row:
    """Where one stage stands."""

    stage: str
    state: str  # done, running, stopped, lost, failed, out of date, ready, waiting
    doing: dict[str, Any] | None = None  # a bar's facts: label, done, total, unit, rate, figures
    job: str | None = None
    host: str | None = None
    ranks: int | None = None
    attempt: int | None = None
    time: float | None = None  # Unix seconds of the last word
    why: str | None = None
    log: str | None = None
    preview: str | None = None  # the newest picture of a training


def look(stages: Pipeline, runs: Path) -> list[Row]:
    """Every stage of the project, in DVC's order."""
    standing = Standing(stages)
    said = _said(runs)
    current = {stage.address for stage in standing.current()}
    return [
        replace(_row(stage, stages, standing, said, current, runs), preview=_preview(stage, stages, said, runs))
        for stage in stages.stages
    ]


def _preview(stage: Stage, stages: Pipeline, said: dict[str, dict[str, Any]], runs: Path) -> str | None:
    """The newest picture of the training that wrote last to the stage's output, or whose model is there."""
    if stage.name not in ("train", "distill"):
        return None
    output = stages.root / stage.output
    key = said.get(str(output), {}).get("key")
    if key is None:
        try:
            key = artifacts.read(output, "model").manifest.key
        except InputError:
            return None
    pictures = previews_of(key, runs)
    return str(pictures[-1]) if pictures else None


def _said(runs: Path) -> dict[str, dict[str, Any]]:
    """What the newest work on each output said last, by the output's path."""
    found: dict[str, dict[str, Any]] = {}
    for path in runs.glob(f"*/*/{status.FILE}"):
        body = status.read(path)
        if body is not None and body["time"] >= found.get(body["output"], {"time": 0.0})["time"]:
            found[body["output"]] = body
    return found


def _row(
    stage: Stage,
    stages: Pipeline,
    standing: Standing,
    said: dict[str, dict[str, Any]],
    current: set[str],
    runs: Path,
) -> Row:
    word = said.get(str(stages.root / stage.output))
    if word is not None and word["state"] == "running":
        return _spoken(stage, word)
    if stage.address in current:
        return Row(stage.address, "done")
    place = logs.folder(runs, stage.name, stage.entry)
    ended = logs.last(place)
    if ended is not None and ended.code and (word is None or ended.time > word["time"]):
        why = ended.said + (", given up: two attempts saved nothing" if _futile(place) else "")
        state = "stopped" if ended.code == 75 else "failed"
        return Row(stage.address, state, time=ended.time, why=why, log=str(ended.log) if ended.log else None)
    if word is not None and word["state"] != "done":
        return _spoken(stage, word)
    behind = [source.address for source in stages.upstream(stage) if source.address not in current]
    if behind:
        more = f" and {len(behind) - NAMED} more" if len(behind) > NAMED else ""
        return Row(stage.address, "waiting", why=f"for {', '.join(behind[:NAMED])}{more}")
    if standing.missing(stage):
        return Row(stage.address, "ready")
    return Row(stage.address, "out of date", why=standing.problem(stage))


def _spoken(stage: Stage, word: dict[str, Any]) -> Row:
    facts = {name: word.get(name) for name in ("doing", "job", "host", "ranks", "attempt", "time", "log")}
    why = word.get("error")
    if word["state"] == "lost":
        why = "ended without reporting anything: its state is kept, start it again"
    return Row(stage.address, word["state"], why=why, **facts)


def _futile(place: Path) -> bool:
    try:
        return int((place / "futile").read_text(encoding="utf-8")) >= FUTILE
    except (OSError, ValueError):
        return False


def lines(rows: Sequence[Row], stood: Path) -> Iterator[str]:
    """The table for a terminal, with paths for somebody who stands there, and a last line that counts."""
    first, second = max(len(row.stage) for row in rows), max(len(row.state) for row in rows)
    for row in rows:
        state = coloured(f"{row.state:<{second}}", COLOURS.get(row.state), sys.stdout)
        yield f"{row.stage:<{first}}  {state}  {'; '.join(_parts(row))}".rstrip()
        if row.log is not None and row.state in ("failed", "lost"):
            yield f"{'':<{first}}  {'':<{second}}  see {project.shown(Path(row.log), stood)}"
        if row.preview is not None:
            yield f"{'':<{first}}  {'':<{second}}  preview {project.shown(Path(row.preview), stood)}"
    states = [row.state for row in rows]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    yield f"{len(rows)} stages: " + ", ".join(f"{count} {state}" for state, count in counts.items())


def _parts(row: Row) -> Iterator[str]:
    if row.why is not None:
        yield row.why
    if row.doing is not None and row.state != "failed":
        yield _progress(row.doing, left=row.state == "running")
    if row.state in ("running", "lost"):
        place = f"job {row.job} on {row.host}" if row.job else f"{row.host}"
        ranks = "" if row.ranks in (None, 1) else f", {row.ranks} ranks"
        yield place + ranks + (f", attempt {row.attempt}" if row.attempt else "")
    if row.time is not None and row.state != "running":
        yield f"{duration(time.time() - row.time)} ago"


def _progress(doing: dict[str, Any], *, left: bool) -> str:
    done, total, rate = doing["done"], doing["total"], doing["rate"]
    text = f"{doing['label']} {done:,} of {total:,} {doing['unit']} ({100 * done / max(total, 1):.0f}%)"
    if left and rate > 0:
        text += f", {rate:.4g}/s, {duration((total - done) / rate)} left"
    return text + (f", {doing['figures']}" if doing["figures"] else "")


def benchmark_lines(runs: Path) -> Iterator[str]:
    """A line a rule: how often it ran, seconds, memory at the most, mean load of a job."""
    rules: dict[str, list[dict[str, str]]] = {}
    for path in sorted((runs / "benchmarks").glob("*/*.tsv")):
        with path.open(encoding="utf-8") as file:
            rules.setdefault(path.parent.name, []).extend(csv.DictReader(file, delimiter="\t"))
    if not rules:
        raise InputError(f"no figures below {runs / 'benchmarks'}: Snakemake writes them when its jobs end")
    yield f"{'rule':<12} {'jobs':>5} {'seconds':>10} {'longest':>10} {'memory MB':>10} {'load %':>8}"
    for rule, rows in rules.items():
        seconds = [float(row["s"]) for row in rows]
        memory = [float(row["max_rss"]) for row in rows if is_number(row["max_rss"])]
        loads = [float(row["mean_load"]) for row in rows if is_number(row["mean_load"])]
        most = f"{max(memory):.0f}" if memory else "–"
        load = f"{sum(loads) / len(loads):.0f}" if loads else "–"
        yield f"{rule:<12} {len(rows):>5} {sum(seconds):>10.1f} {max(seconds):>10.1f} {most:>10} {load:>8}"
