"""Measure a run's images against the reference: distances, precision and recall, accuracy, diversity, memorisation.

Every figure stands beside its protocol, and each distance beside the real-against-real floor at the same count; with
several sampling seeds, figures are means over seeds with their 95% t-intervals. `--watch` does it for the saved states
of a training, while it trains or later.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipestill import artifacts, outputs
from pipestill.config import EvaluationParams, OperationParams, mix_of
from pipestill.errors import InputError
from pipestill.evaluation.headline import file_of
from pipestill.launch import Spread
from pipestill.outputs import ArtifactKind, Kind, Written
from pipestill.progress import say
from pipestill.stages.common import add_common, add_launch, entry, load_params, spread_of, work_over_ranks
from pipestill.stages.watch import watch
from pipestill.work import writing

if TYPE_CHECKING:
    from pipestill.artifacts import Artifact
    from pipestill.distributed import World
    from pipestill.evaluation.matching import Match
    from pipestill.evaluation.reference import Reference
    from pipestill.sampling.store import Samples
    from pipestill.work import Work

VERSION = 5
METRICS, SEEDS = "metrics.json", "seeds.json"
EXAMPLES = """\
  pipestill evaluate --name student-4 --samples artifacts/samples/student-4 --reference artifacts/reference \\
      --output artifacts/evaluations/student-4 --metrics metrics/student-4.json
  pipestill evaluate --name mine --samples /tmp/samples --reference artifacts/reference --output /tmp/evaluation
  pipestill evaluate --name student-4 --watch artifacts/models/student-4 --reference artifacts/reference \\
      --output runs/watched/student-4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, name="the run, for messages")
    parser.add_argument(
        "--output", type=Written(_output), required=True, metavar="DIR", help="where the artefact or table goes"
    )
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--samples", type=Path, metavar="DIR", help="samples artefact")
    of.add_argument(
        "--watch",
        type=Path,
        metavar="DIR",
        help="evaluate the saved states of the training whose --output this is, as they appear, into one table",
    )
    parser.add_argument("--reference", type=Path, required=True, metavar="DIR", help="reference artefact")
    parser.add_argument(
        "--metrics", type=Written(outputs.METRICS), metavar="FILE", help="the main metrics, for people, git and DVC"
    )
    parser.add_argument("--by", metavar="FIGURE", help="with --watch: the best state is the one whose figure is lowest")
    parser.add_argument("--dataset", type=Path, metavar="DIR", help="with --watch: dataset artefact, for plan=data")
    add_launch(parser)


def _output(options: argparse.Namespace) -> Kind:
    return outputs.WATCH if options.watch is not None else ArtifactKind("evaluation")


def spread(options: argparse.Namespace) -> Spread:
    return spread_of(options, "evaluate")


def main(options: argparse.Namespace) -> None:
    params = load_params(options)
    if options.watch is not None:
        if options.metrics is not None:
            raise InputError("--metrics belongs to --samples: what --watch finds is in its table")
        watch(
            entry(params.sampling.runs, options.name, "sampling.runs"),
            name=options.name,
            training=options.watch,
            reference=options.reference,
            output=options.output,
            operation=params.operation,
            by=options.by,
            dataset=options.dataset,
        )
        return
    if options.by is not None or options.dataset is not None:
        raise InputError("--by and --dataset belong to --watch")
    evaluate(
        params.evaluation,
        name=options.name,
        samples=options.samples,
        reference=options.reference,
        output=options.output,
        operation=params.operation,
        metrics=options.metrics,
    )


def evaluate(
    params: EvaluationParams,
    *,
    name: str,
    samples: Path,
    reference: Path,
    output: Path,
    operation: OperationParams,
    metrics: Path | None = None,
) -> Artifact | None:
    """Measures a samples artefact; returns the evaluation artefact on the leader.

    Raises InputError where samples and reference do not fit, and Stopped.
    """
    if metrics is not None:
        outputs.METRICS.check(metrics)
    sampled = artifacts.read(samples, "samples")
    inputs = {"samples": sampled.as_input, "reference": artifacts.read(reference, "reference").as_input}
    with work_over_ranks(
        kind="evaluation",
        stage="evaluate",
        version=VERSION,
        parameters=params.plain(),
        inputs=inputs,
        output=output,
        threads=params.threads,
        operation=operation,
    ) as (world, work):
        artifact = work.done
        if artifact is None:
            from pipestill.evaluation.reference import open_reference
            from pipestill.sampling.store import open_samples

            artifact = _measure(params, name, open_samples(samples), open_reference(reference), work, world)
        if world.leader and artifact is not None and metrics is not None:
            outputs.write_file(
                metrics, outputs.METRICS, file_of([json.loads(artifact.file(METRICS).read_text(encoding="utf-8"))])
            )
        return artifact


def check(samples: Samples, reference: Reference) -> None:
    """Raises InputError, in one line, where the reference was made for other images than these."""
    path, against = samples.artifact.path, reference.folder
    height, width, channels = samples.index["shape"]
    if (height, width, channels) != (reference.resolution, reference.resolution, reference.channels):
        raise InputError(
            f"{path} holds {height}x{width} images with {channels} channels, {against} was made from "
            f"{reference.resolution}x{reference.resolution} with {reference.channels}: use the reference of this data"
        )
    labelled = bool((samples.labels >= 0).any())
    if labelled and tuple(samples.index["classes"]) != reference.classes:
        raise InputError(
            f"{path} has {len(samples.index['classes'])} classes, {against} has {len(reference.classes)} or other "
            "names: use the reference of this data"
        )
    reference.floor(samples.images_per_seed, mix_of(samples.plan))
    reference.check_count(samples.images_per_seed)
    if samples.spaces and samples.artifact.manifest.inputs["extractors"] != reference.measures:
        raise InputError(f"{path} holds features by other extractors than {against}'s: sample it anew for this one")


def _measure(
    params: EvaluationParams, name: str, samples: Samples, reference: Reference, work: Work, world: World
) -> Artifact | None:
    check(samples, reference)
    import torch
    from torch import Tensor

    from pipestill.evaluation import measure
    from pipestill.evaluation.clock import Clock
    from pipestill.evaluation.intervals import rounded
    from pipestill.evaluation.matching import match
    from pipestill.evaluation.tables import extract

    clock = Clock()

    def images(first: int, last: int) -> Tensor:
        return torch.from_numpy(samples.images(first, last)).permute(0, 3, 1, 2)

    extractors = [reference.extractor(space, world.device) for space in reference.index.spaces]
    if samples.spaces:
        tables = {space: torch.from_numpy(samples.features(space)) for space in samples.spaces}
    else:
        tables = extract(work.state, "samples", extractors, images, samples.count, block=params.batch, world=world)
    clock.mark("features_seconds")
    if not world.leader:
        return None

    matched, labels = match(reference, samples.plan), torch.from_numpy(samples.labels)
    by_seed = measure.by_seed(reference, tables, labels, samples.seeds, matched, world.device)
    body = _figures(samples, reference, matched, list(by_seed.values()))
    clock.mark("metrics_seconds")

    staging = work.staging()
    seeds = {seed: {key: rounded(value) for key, value in found.items()} for seed, found in by_seed.items()}
    with writing(staging):
        (staging / METRICS).write_text(_json(body), encoding="utf-8")
        (staging / SEEDS).write_text(_json(seeds), encoding="utf-8")
    summary = {key: value for key, value in body.items() if key.startswith(("fd_", "class_accuracy", "diversity"))}
    artifact = work.publish(staging, summary)
    work.record(finished=True, images=samples.count, ranks=world.size, **clock.seconds)
    say(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in summary.items()))
    return artifact


def _figures(
    samples: Samples, reference: Reference, matched: Match, repetitions: list[dict[str, float]]
) -> dict[str, Any]:
    """metrics.json: means over seeds, the floor beside each distance, what the run was, and the protocol in words.

    `mix` and `notes` are lists for the same reason as the protocol: DVC makes a column of every text.
    """
    from pipestill.evaluation import measure
    from pipestill.evaluation.intervals import rounded

    means, intervals = measure.summarise(repetitions)
    floor = reference.floor(samples.images_per_seed, mix_of(samples.plan))
    beside = {}
    for key, value in means.items():
        if key.startswith("fd_"):
            beside[f"floor_{key}"] = floor[key]
            beside[f"excess_{key}"] = rounded(value - floor[key])
    texts = measure.protocol_text(reference, means, matched) | {"floor": measure.texts_of(floor["protocol"])["floor"]}
    if intervals:
        texts["intervals"] = measure.INTERVAL.format("sampling seeds")
    run = {
        "evaluations": samples.index["evaluations"],
        "guidance": samples.index["guidance"],
        "images": samples.count,
        "seeds": len(samples.seeds),
        "mix": [samples.plan],
        "notes": list(matched.notes),
    }
    return {**means, **beside, **run, "intervals": intervals, "protocol": measure.stated(texts)}


def _json(body: dict[str, Any]) -> str:
    return json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
