"""Build the reference: what images are measured against, once for tuning, distillation and evaluation.

From a dataset's parts: features and float64 moments in each extractor's space, the small classifier trained on the
train part alone, and the real-against-real floors at the counts in use.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pipestill import artifacts, outputs
from pipestill.config import OperationParams, ReferenceParams
from pipestill.errors import InputError
from pipestill.evaluation.headline import file_of
from pipestill.launch import Spread
from pipestill.outputs import Written
from pipestill.progress import say
from pipestill.stages.common import add_common, add_launch, load_params, spread_of, work_over_ranks
from pipestill.work import writing

if TYPE_CHECKING:
    from pipestill.artifacts import Artifact, InputEntry
    from pipestill.data.store import Dataset
    from pipestill.distributed import World
    from pipestill.work import Work

VERSION = 5
EXAMPLES = """\
  pipestill reference --dataset artifacts/dataset --output artifacts/reference --metrics metrics/floor.json
  pipestill reference --dataset artifacts/dataset --output /tmp/reference reference.floor.counts=[200,500]
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, makes="reference")
    parser.add_argument("--dataset", type=Path, required=True, metavar="DIR", help="dataset artefact")
    parser.add_argument(
        "--metrics", type=Written(outputs.FLOOR), metavar="FILE", help="the floor's main metrics, for people, git, DVC"
    )
    add_launch(parser)


def spread(options: argparse.Namespace) -> Spread:
    return spread_of(options, "reference")


def main(options: argparse.Namespace) -> None:
    params = load_params(options)
    build_reference(
        params.reference,
        dataset=options.dataset,
        output=options.output,
        operation=params.operation,
        metrics=options.metrics,
    )


def build_reference(
    params: ReferenceParams,
    *,
    dataset: Path,
    output: Path,
    operation: OperationParams,
    metrics: Path | None = None,
) -> Artifact | None:
    """Builds the reference of a dataset artefact; returns it on the leader.

    Raises InputError where parameters and data do not fit or a weights file is missing, and Stopped.
    """
    if metrics is not None:
        outputs.FLOOR.check(metrics)
    source = artifacts.read(dataset, "dataset")
    inputs = {"dataset": source.as_input} | _outside(params)
    with work_over_ranks(
        kind="reference",
        stage="reference",
        version=VERSION,
        parameters=params.plain(),
        inputs=inputs,
        output=output,
        threads=params.threads,
        operation=operation,
    ) as (world, work):
        artifact = work.done
        if artifact is None:
            from pipestill.data.store import open_dataset

            artifact = _build(params, open_dataset(dataset), inputs, work, world)
        if world.leader and artifact is not None and metrics is not None:
            from pipestill.evaluation.reference import FLOOR

            floors = json.loads(artifact.file(FLOOR).read_text(encoding="utf-8"))
            outputs.write_file(metrics, outputs.FLOOR, file_of(list(floors.values())))
        return artifact


def _outside(params: ReferenceParams) -> dict[str, InputEntry]:
    """The files outside any artefact that decide the result. Raises InputError for a missing one."""
    found = {}
    wants_inception = "inception" in params.protocol.extractors
    if wants_inception:
        from pipestill.evaluation.extractors import inception_weights

        found["inception_weights"] = artifacts.outside_input(inception_weights(params.protocol.inception_weights))
    if params.statistics is not None:
        if not wants_inception:
            raise InputError(
                "reference.statistics holds Inception moments: add inception to reference.protocol.extractors "
                "or leave reference.statistics empty"
            )
        if not Path(params.statistics).is_file():
            raise InputError(f"reference.statistics={params.statistics} is not there: give an npz with mu and sigma")
        found["statistics"] = artifacts.outside_input(Path(params.statistics))
    return found


def _build(
    params: ReferenceParams, data: Dataset, inputs: dict[str, InputEntry], work: Work, world: World
) -> Artifact | None:
    from pipestill.evaluation import building
    from pipestill.evaluation.clock import Clock
    from pipestill.evaluation.reference import floor_key

    building.check(params, data)
    clock = Clock()
    judge = building.train_classifier(params, data, work.state, world)
    clock.mark("classifier_seconds")
    extractors = building.make_extractors(params, judge, world)
    moments = building.measure_parts(params, data, extractors, work.state, world)
    clock.mark("features_seconds")
    if not world.leader:
        return None
    staging = work.staging()
    with writing(staging):
        reference = building.write_payload(
            params,
            data,
            extractors,
            moments,
            work.state,
            staging,
            inception_sha256=inputs["inception_weights"].payload if "inception_weights" in inputs else None,
            world=world,
        )
    clock.mark("floors_seconds")
    distances = {
        floor_key(count, plan): {
            key: value for key, value in reference.floor(count, plan).items() if key.startswith("fd_")
        }
        for plan in building.floor_plans(params, data.classes)
        for count in params.floor.counts
    }
    index = reference.index
    summary = {"images": dict(index.images), "accuracy": dict(index.accuracy), "floors": distances}
    artifact = work.publish(staging, summary)
    work.record(finished=True, ranks=world.size, **clock.seconds)
    for name, found in distances.items():
        say(f"floor of {name} images: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()))
    return artifact
