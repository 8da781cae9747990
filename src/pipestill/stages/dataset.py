"""Validates images and builds the dataset artefact: raw uint8 in one LMDB file, labels, the split, and a report.

With --check, validates alone and writes no artefact; with --export-lmdb, writes a dataset in DMD2's LMDB layout.
Sources, colour, size and the rule for bad images are the parameters of `data`.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipestill import outputs
from pipestill.config import DataParams, contradictions
from pipestill.data.complaints import line
from pipestill.errors import InputError
from pipestill.outputs import ArtifactKind, Written
from pipestill.progress import say, warn
from pipestill.stages import common
from pipestill.stopping import StopRequest
from pipestill.userfiles import escaped
from pipestill.work import open_work, scratch, writing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipestill.artifacts import Artifact
    from pipestill.data.ingest import Ingested
    from pipestill.data.source import Source

VERSION = 7
PRINTED = 20  # faults that are printed; the report has them all
EXAMPLES = """
  pipestill dataset --check photos --report photos-report data.resolution=32 data.color=rgb data.transform=center-crop
  pipestill dataset --output artifacts/dataset \\
      data.path=photos data.resolution=32 data.color=rgb data.transform=center-crop
  pipestill dataset --export-lmdb photos.lmdb --dataset artifacts/dataset --part train
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_common(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--output", type=Written(ArtifactKind("dataset")), metavar="DIR", help="build the dataset artefact there"
    )
    what.add_argument("--check", metavar="DIR", help="validate the images there (instead of data.path) and stop")
    what.add_argument(
        "--export-lmdb", type=Written(outputs.LMDB), metavar="FILE", help="write --dataset in DMD2's layout"
    )
    parser.add_argument(
        "--report",
        type=Written(outputs.DATA_REPORT),
        metavar="DIR",
        help="with --check: write report.json and .html there",
    )
    parser.add_argument("--dataset", type=Path, metavar="DIR", help="with --export-lmdb: the dataset artefact")
    parser.add_argument("--part", choices=("train", "validation", "test"), help="with --export-lmdb: only this part")
    common.add_deadline(parser)


def main(options: argparse.Namespace) -> int:
    _require_used(options)
    if options.export_lmdb is not None:
        export(options.dataset, options.export_lmdb, options.part)
        return 0
    params = common.load_params(options, *(() if options.check else ("data",)))
    workers = params.operation.workers
    stop = StopRequest(params.operation.margin)
    with stop.listening():
        if options.check is not None:
            from pipestill.evaluation.limits import misfits

            data = params.data.model_copy(update={"path": options.check})
            found = check(data, report=options.report, workers=workers, stop=stop)
            if not found["images"]:
                return 2  # what is wrong with the files says it all
            train = {entry["name"]: entry["train"] for entry in found["classes"]}
            refused = misfits(params.reference, found["parts"], train, where=options.check)
            for reason in refused or list(contradictions(params))[:1]:
                warn(f"the stages that follow would refuse this: {reason}")
            return 2 if found["bad"]["count"] else 0
        build(params.data, options.output, workers=workers, stop=stop)
    return 0


def _require_used(options: argparse.Namespace) -> None:
    """Raises InputError for an option that belongs to another way of calling this stage."""
    for name, way in (("report", "check"), ("dataset", "export_lmdb"), ("part", "export_lmdb")):
        if getattr(options, name) is not None and getattr(options, way) is None:
            raise InputError(f"--{name} goes with --{way.replace('_', '-')} alone: leave it out")


def build(data: DataParams, output: Path, *, workers: int = 1, stop: StopRequest | None = None) -> Artifact:
    """Builds the dataset artefact at `output`, or finds it there; goes on where a killed build was.

    Raises InputError where images are bad and `data.on_bad` is `refuse`, Stopped, and SurroundingsError.
    """
    from pipestill.data.identity import input_of
    from pipestill.data.ingest import ingest
    from pipestill.data.sources import open_source
    from pipestill.data.store import Layout, write_dataset
    from pipestill.data.transforms import Form

    outputs.require_apart("--output", output, [Path(data.path)])
    if outputs.within(output, Path(data.path)):
        raise InputError(f"--output {output} lies among the images of {data.path}: choose a path elsewhere")
    source, form = open_source(data), Form.of(data)
    with open_work(
        kind="dataset",
        stage="dataset",
        version=VERSION,
        parameters=data.plain(),
        inputs={"images": input_of(source, Path(data.path))},
        output=output,
    ) as work:
        if work.done is not None:
            say(f"{output} is there and verifies: nothing to do")
            return work.done
        ingested = ingest(source, form, work.state, workers=workers, stop=stop)
        kept, parts, report = _examined(source, ingested, data)
        if report["bad"]["count"] and data.on_bad == "refuse":
            _write_report(work.folder, report, source, ingested, kept)
            shutil.rmtree(work.state)
            raise InputError(_refusal(report, data, work.folder / "report.html"))
        _require_enough(source, kept, parts)
        staging = work.staging()
        layout = Layout(len(kept), form.resolution, form.channels, data.images_per_value)
        with writing(staging):
            pixel_std = write_dataset(
                staging,
                _blocks(ingested.pixels, kept, layout.per_value),
                layout,
                classes=source.classes,
                labels=source.labels[kept],
                parts=parts,
                names=[source.names[index] for index in kept],
                digests=ingested.facts["digest"][kept],
            )
            _write_report(staging, report, source, ingested, kept)
        summary = {
            "images": len(kept),
            "classes": len(source.classes),
            "empty_classes": report["empty_classes"],
            "parts": report["parts"],
            "pixel_std": pixel_std,
            "set_aside": {file["name"]: file["reason"] for file in report["bad"]["files"]},
        }
        artifact = work.publish(staging, summary, views=("report.html",))
        work.record(finished=True, images=len(kept), workers=workers)
    say(f"{output}: {summarised(report)}")
    return artifact


def check(
    data: DataParams, *, report: Path | None = None, workers: int = 1, stop: StopRequest | None = None
) -> dict[str, Any]:
    """Validates the images without an artefact, prints what it found and writes it to `report`; returns it."""
    from pipestill.data.ingest import ingest
    from pipestill.data.sources import open_source
    from pipestill.data.transforms import Form

    source = open_source(data)
    if report is not None and outputs.within(report, Path(data.path)):
        raise InputError(f"--report {report} lies among the images of {data.path}: choose a path elsewhere")
    with scratch("check") as folder:
        ingested = ingest(source, Form.of(data), folder, workers=workers, stop=stop)
        kept, _, found = _examined(source, ingested, data)
        if report is not None:
            with outputs.new_folder(report, outputs.DATA_REPORT) as staging:
                _write_report(staging, found, source, ingested, kept)
    say(
        f"{data.path} as data.format={data.format} resolution={data.resolution} color={data.color} "
        f"transform={data.transform} filter={data.filter}: {summarised(found)}"
    )
    _print_faults(found)
    for sentence in found["advice"]:
        say(f"  note: {sentence}")
    return found


def export(dataset: Path | None, file: Path, part: str | None = None) -> None:
    """Writes a dataset artefact, or one part of it, in DMD2's LMDB layout."""
    import numpy as np

    from pipestill.data.store import export_dmd2, open_dataset

    if dataset is None:
        raise InputError("--export-lmdb needs --dataset DIR: the dataset artefact to export")
    opened = open_dataset(dataset)
    source = opened.artifact.manifest.parameters.get("path", dataset)
    outputs.require_apart("--export-lmdb", file, [dataset, Path(source)])
    indices = np.arange(len(opened)) if part is None else opened.split[part]
    export_dmd2(opened, indices, file)
    say(f"{file}: {len(indices)} images in DMD2's layout")


def summarised(report: dict[str, Any]) -> str:
    """The report in one line."""
    from pipestill import mixes

    parts, duplicates, empty = report["parts"], report["duplicates"], report["empty_classes"]
    without = f" ({len(empty)} without images: {mixes.listed(empty)})" if empty else ""
    return (
        f"{report['images']} good images in {len(report['classes'])} classes{without} "
        f"(train {parts['train']}, validation {parts['validation']}, test {parts['test']}), "
        f"{report['bad']['count']} bad, {duplicates['exact']['repeats']} exact repeats, "
        f"{duplicates['near']['pairs']} near pairs, imbalance {report['imbalance']:.3g}"
    )


def _examined(
    source: Source, ingested: Ingested, data: DataParams
) -> tuple[NDArray[np.int64], NDArray[np.uint8], dict[str, Any]]:
    """Indices of the good images, the part of each, and the report."""
    import numpy as np

    from pipestill.data.division import divide
    from pipestill.data.validation import examine

    kept = np.flatnonzero(ingested.facts["good"])
    stated = None if source.parts is None else source.parts[kept]
    division = divide(source.labels[kept], ingested.facts[kept], stated, data)
    return kept, division.parts, examine(source, ingested, kept, division, data)


def _require_enough(source: Source, kept: NDArray[np.int64], parts: NDArray[np.uint8]) -> None:
    """Raises InputError where no good image is left to train on, or a class has none in train."""
    import numpy as np

    if not (parts == 0).any():
        raise InputError("no good image is left to train on: mend the bad ones (pipestill dataset --check)")
    lacking = np.setdiff1d(source.labels, source.labels[kept[parts == 0]])
    if len(lacking):
        name = source.classes[lacking[0]]
        raise InputError(f"class '{name}' has no good image in the train part: add some, or remove the class")


def _write_report(
    folder: Path, report: dict[str, Any], source: Source, ingested: Ingested, kept: NDArray[np.int64]
) -> None:
    from pipestill.data.page import write_report

    write_report(
        folder,
        report,
        classes=source.classes,
        labels=source.labels[kept],
        names=[source.names[index] for index in kept],
        images=lambda indices: ingested.pixels[kept[indices]],
    )


def _refusal(report: dict[str, Any], data: DataParams, page: Path) -> str:
    """The one line about bad files, after a line for each fault if there are several."""
    bad, faults = report["bad"]["files"], report["bad"]["faults"]
    if len(faults) > 1:
        _print_faults(report)
    first = f"{escaped(Path(data.path) / bad[0]['name'])} {bad[0]['reason']}"
    if len(bad) == 1:
        what = first
    elif len(faults) == 1:
        what = f"{data.path}: {line(faults[0])}"
    else:
        what = f"{len(bad):,} files of {data.path} cannot be used, the first is {first}"
    return f"{what}: fix or remove them, or set data.on_bad=set-aside (report: {page})"


def _print_faults(report: dict[str, Any]) -> None:
    faults = report["bad"]["faults"]
    for fault in faults[:PRINTED]:
        warn(f"  {line(fault)}")
    if len(faults) > PRINTED:
        warn(f"  and {len(faults) - PRINTED} other faults: see the report")


def _blocks(pixels: NDArray[np.uint8], kept: NDArray[np.int64], size: int) -> Iterator[NDArray[np.uint8]]:
    """The kept images, `size` at a time; without a copy where none between them was set aside."""
    for start in range(0, len(kept), size):
        some = kept[start : start + size]
        together = int(some[-1]) - int(some[0]) + 1 == len(some)
        yield pixels[some[0] : some[-1] + 1] if together else pixels[some]
