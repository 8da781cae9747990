"""One self-contained page: results beside their floors, distances, samples, curves, the data, the provenance.

Everything but timings is kept as `report.json`; the page shows it, and opens without a network.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pipestill.config import Params
from pipestill.errors import InputError
from pipestill.outputs import ArtifactKind, Written
from pipestill.progress import say, warn
from pipestill.stages.common import add_common, load_params
from pipestill.work import open_work, read_record

if TYPE_CHECKING:
    from pipestill.artifacts import Artifact
    from pipestill.reporting.page import Timings
    from pipestill.reporting.sources import Places, Sources

VERSION = 4
PAGE = "index.html"
EXAMPLES = """\
  pipestill report --evaluations artifacts/evaluations --samples artifacts/samples --models artifacts/models \\
      --dataset artifacts/dataset --reference artifacts/reference --output artifacts/report
  pipestill report --print-table metrics
"""
FOLDERS = {
    "dataset": "dataset artefact",
    "reference": "reference artefact",
    "models": "folder with a model artefact for each teacher and student",
    "samples": "folder with a samples artefact for each run",
    "evaluations": "folder with an evaluation artefact for each run",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--output", type=Written(ArtifactKind("report")), metavar="DIR", help="where the artefact goes")
    for name, text in FOLDERS.items():
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=text)
    parser.add_argument("--tuned", type=Path, metavar="DIR", help="folder with tuned artefacts, for the provenance")
    parser.add_argument(
        "--metrics", type=Path, metavar="DIR", help="where timings are taken from that this machine has no record of"
    )
    parser.add_argument(
        "--partial", action="store_true", help="leave out what is missing or made from other inputs, and say so"
    )
    parser.add_argument(
        "--print-table",
        type=Path,
        metavar="DIR",
        help="print the metrics in DIR as a small table, and nothing else; a params.yaml beside DIR says of which runs",
    )


def main(options: argparse.Namespace) -> None:
    if options.print_table is not None:
        from pipestill.reporting.table import results_table

        print(results_table(options.print_table), end="")
        return
    missing = [f"--{name}" for name in (*FOLDERS, "output") if getattr(options, name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} missing: name every place, or use --print-table (see --help)")
    from pipestill.reporting.sources import Places

    places = Places(**{name: getattr(options, name) for name in FOLDERS}, tuned=options.tuned)
    params = load_params(options)
    report(params, places=places, output=options.output, metrics=options.metrics, partial=options.partial)


def report(
    params: Params, *, places: Places, output: Path, metrics: Path | None = None, partial: bool = False
) -> Artifact:
    """Makes the report over every teacher, student and run that the parameters name; returns its artefact.

    Raises InputError where one of them is missing or was made from other inputs than those given.
    """
    from pipestill.reporting import sources as finder

    sources = finder.find(params, places, partial=partial)
    for name, reason in sources.left_out.items():
        warn(f"left out: {name} ({reason})")
    parameters = params.report.plain()
    if sources.left_out:
        parameters["left_out"] = sorted(sources.left_out)  # a partial report is another piece of work
    with open_work(
        kind="report",
        stage="report",
        version=VERSION,
        parameters=parameters,
        inputs=sources.inputs,
        output=output,
    ) as work:
        if work.done is not None:
            say(f"{output} is there and verifies: nothing to do")
            return work.done

        from pipestill import digests
        from pipestill.data.store import open_dataset
        from pipestill.reporting import gather, grids, page, tables

        dataset = open_dataset(places.dataset)
        body = gather.gather(sources, dataset, params.report)
        body["grids"], files = grids.make_grids(sources, dataset, params.report)
        files |= {f"charts/distance-{space}.svg": text.encode() for space, text in page.chart_files(body).items()}
        staging = work.staging()
        for name, content in (files | tables.plot_files(body)).items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(content)
        (staging / "report.json").write_text(digests.canonical_json(body) + "\n", encoding="utf-8")
        (staging / PAGE).write_text(page.render(body, files, timings(sources, metrics)), encoding="utf-8")
        artifact = work.publish(staging, {"runs": len(body["runs"]), "verdict": body["verdict"]}, views=(PAGE,))
        work.record(finished=True)
        say(f"the report: {output / PAGE}")
        return artifact


def timings(sources: Sources, metrics: Path | None) -> Timings:
    """Seconds from this machine's records, else from the metrics files, else none."""
    from pipestill.reporting.gather import read_metrics_file
    from pipestill.reporting.page import Timings

    runs = {}
    for name, artifact in sources.samples.items():
        seconds = read_record("sample", artifact.manifest.key).get("seconds_per_image")
        if seconds is None and metrics is not None:
            seconds = read_metrics_file(metrics / f"{name}.json").get("seconds_per_image")
        runs[name] = seconds
    work = {
        name: read_record(artifact.manifest.stage, artifact.manifest.key).get("seconds")
        for name, artifact in sources.named().items()
    }
    return Timings(runs, work)
