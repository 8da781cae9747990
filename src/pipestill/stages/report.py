"""One self-contained page: results beside their floors, distances, samples, curves, the data, the provenance.

The artefact holds the page and its content as `report.json`. A second page below `$PIPESTILL_RUNS` also shows what only
this machine knows: times, and the pictures that trainings made on the way.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipestill import previews
from pipestill.config import Params
from pipestill.errors import InputError
from pipestill.outputs import ArtifactKind, Written
from pipestill.progress import say, warn
from pipestill.stages.common import add_common, load_params
from pipestill.work import open_work, read_record, runs_root, write_atomic, writing

if TYPE_CHECKING:
    from pipestill.artifacts import Artifact
    from pipestill.reporting.page import Local, Preview
    from pipestill.reporting.sources import Places, Sources

VERSION = 7
PAGE = "index.html"
PICTURES = (".png", ".webp")
PREVIEWS = 6  # shown of each model
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
    report(params, places=places, output=options.output, partial=options.partial)


def report(params: Params, *, places: Places, output: Path, partial: bool = False) -> Artifact:
    """Makes the report on every model and run that the parameters name; returns its artefact.

    Also writes `full_page()`. Raises InputError if a model or run is missing or was made from other inputs than those
    given.
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
        from pipestill import digests
        from pipestill.data.store import open_dataset
        from pipestill.reporting import gather, grids, page, tables

        if work.done is None:
            dataset = open_dataset(places.dataset)
            body = gather.gather(sources, dataset, params.report)
            body["grids"], files = grids.make_grids(sources, dataset, params.report)
            files |= {f"charts/distance-{space}.svg": text.encode() for space, text in page.chart_files(body).items()}
            files |= tables.plot_files(body)
            files |= {"report.json": (digests.canonical_json(body) + "\n").encode()}
            files |= {PAGE: page.render(body, files).encode()}
            staging = work.staging()
            with writing(staging):
                for name, content in files.items():
                    (staging / name).parent.mkdir(parents=True, exist_ok=True)
                    (staging / name).write_bytes(content)
            artifact = work.publish(staging, {"runs": len(body["runs"]), "verdict": body["verdict"]})
            work.record(finished=True)
        else:
            artifact = work.done
            say(f"{output} is there and verifies: nothing to do")
        _write_full_page(artifact, sources)
        say(f"report: {output / PAGE}")
        say(f"report with this machine's times and previews: {full_page()}")
        return artifact


def full_page() -> Path:
    """Where the page with times and previews of the last report is."""
    return runs_root() / "report" / PAGE


def _write_full_page(artifact: Artifact, sources: Sources) -> None:
    """The page once more, from the artefact's own files, with what this machine knows."""
    from pipestill.reporting import gather, page

    body = gather.read_json(artifact, "report.json")
    files = {name: artifact.file(name).read_bytes() for name in artifact.manifest.files if name.endswith(PICTURES)}
    write_atomic(full_page(), page.render(body, files, local(sources)))


def local(sources: Sources) -> Local:
    """Seconds and previews in this machine's records of the work behind each artefact."""
    from pipestill.reporting.page import Local

    def record(artifact: Artifact) -> dict[str, Any]:
        return read_record(artifact.manifest.stage, artifact.manifest.key)

    return Local(
        runs={name: record(artifact).get("seconds_per_image") for name, artifact in sources.samples.items()},
        artefacts={name: record(artifact).get("seconds") for name, artifact in sources.named().items()},
        previews={name: _previews(artifact) for name, artifact in sources.models.items()},
    )


def _previews(model: Artifact) -> list[Preview]:
    """A few of the grids that a training made, evenly over its updates, the last one among them."""
    from pipestill.reporting.page import Preview

    grids = previews.previews_of(model.manifest.key)
    every = max(1, -(-len(grids) // PREVIEWS))
    chosen = grids[::-1][::every][::-1]
    return [Preview(int(grid.stem.removeprefix("step-")), grid.read_bytes()) for grid in chosen]
