"""Sample images from a model, sharded over ranks: any sampler, class plan, guidance and number of seeds.

Item i of seed s is the same picture for any number of ranks, in any order and after any restart. Finished blocks are
written while the next ones compute, and are never computed again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipestill import artifacts, outputs
from pipestill.config import OperationParams, RunParams
from pipestill.errors import InputError
from pipestill.launch import Spread
from pipestill.outputs import Written
from pipestill.progress import Bar, say
from pipestill.stages.common import add_common, add_launch, entry, load_params, spread_of, work_over_ranks
from pipestill.work import read_record, writing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from pipestill.artifacts import Artifact
    from pipestill.distributed import World
    from pipestill.evaluation.extractors import Extractor
    from pipestill.evaluation.reference import Reference
    from pipestill.networks.model import ModelCard
    from pipestill.sampling.runner import Progress
    from pipestill.work import Work

VERSION = 4
EXAMPLES = """\
  pipestill sample --name student-4 --model artifacts/models/student-4 --output artifacts/samples/student-4
  pipestill sample --name teacher-2m-10 --model artifacts/models/teacher --sigmas artifacts/tuned/teacher \\
      --output /tmp/samples --png /tmp/pictures --ranks 2 sampling.runs.teacher-2m-10.guidance=1.5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, makes="samples", name="which entry of `sampling.runs`")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="model artefact")
    parser.add_argument(
        "--sigmas", type=Path, metavar="DIR", help="tuned artefact, for a run whose sigmas are tuned; else the model"
    )
    parser.add_argument("--dataset", type=Path, metavar="DIR", help="dataset artefact, read for plan=data alone")
    parser.add_argument(
        "--extractors", type=Path, metavar="DIR", help="reference artefact that measures a run with store=features"
    )
    parser.add_argument(
        "--png",
        type=Written(outputs.PNGS),
        metavar="DIR",
        help="also write each image as a PNG, a folder for each class",
    )
    add_launch(parser)


def spread(options: argparse.Namespace) -> Spread:
    return spread_of(options, "sample")


def main(options: argparse.Namespace) -> None:
    params = load_params(options)
    sample(
        entry(params.sampling.runs, options.name, "sampling.runs"),
        name=options.name,
        model=options.model,
        sigmas=options.sigmas,
        dataset=options.dataset,
        extractors=options.extractors,
        output=options.output,
        png=options.png,
        operation=params.operation,
    )


def sample(
    run: RunParams,
    *,
    name: str,
    model: Path,
    output: Path,
    operation: OperationParams,
    sigmas: Path | None = None,
    dataset: Path | None = None,
    extractors: Path | None = None,
    png: Path | None = None,
) -> Artifact | None:
    """Samples the images that a run describes; returns their artefact on the leader.

    `sigmas` is a tuned artefact where the run's range comes from there, `dataset` is read for plan=data alone,
    `extractors` is the reference whose extractors measure the images of a run with store=features.
    Raises InputError (model and run do not fit), SurroundingsError (NaN, full disk, lost rank) and Stopped.
    """
    if png is not None:
        outputs.PNGS.check(png)
    source = artifacts.read(model, "model")
    inputs = {"model": source.as_input}
    tuned = None
    if run.sigmas.startswith("tuned/"):
        tuned = _tuned_for(source, run, sigmas)
        inputs["sigmas"] = tuned.as_input
    elif sigmas is not None and artifacts.read(sigmas, "model").as_input != source.as_input:
        raise InputError(f"sigmas={run.sigmas} is the model's own range, but --sigmas {sigmas} is not --model {model}")
    if run.plan == "data" and dataset is not None:
        inputs["dataset"] = artifacts.read(dataset, "dataset").as_input
    against = None
    if run.store == "features":
        if extractors is None or png is not None:
            raise InputError("store=features measures images and writes none: give --extractors, and no --png")
        from pipestill.evaluation.reference import open_reference

        against = open_reference(extractors)
        inputs["extractors"] = against.measures
    with work_over_ranks(
        kind="samples",
        stage="sample",
        version=VERSION,
        parameters=run.plain(),
        inputs=inputs,
        output=output,
        threads=run.threads,
        operation=operation,
    ) as (world, work):
        artifact = work.done or _sample(run, name, source, tuned, dataset, against, work, world)
        if png is not None and artifact is not None and world.leader:
            write_pngs(artifact.path, png)
        return artifact


def _tuned_for(model: Artifact, run: RunParams, path: Path | None) -> Artifact:
    if path is None:
        raise InputError(f"sigmas={run.sigmas} comes from a tuned artefact: give --sigmas")
    tuned = artifacts.read(path, "tuned")
    if tuned.manifest.inputs["model"].payload != model.as_input.payload:
        raise InputError(f"{path} was tuned for another model than {model.path}: tune this one")
    return tuned


def _sample(
    run: RunParams,
    name: str,
    source: Artifact,
    tuned: Artifact | None,
    dataset: Path | None,
    against: Reference | None,
    work: Work,
    world: World,
) -> Artifact | None:
    from pipestill.networks.model import load_model, read_card
    from pipestill.sampling.features import in_spaces
    from pipestill.sampling.place import place
    from pipestill.sampling.plan import blocks
    from pipestill.sampling.recipe import settle
    from pipestill.sampling.runner import read_blocks, run_blocks
    from pipestill.sampling.store import kept_items, write_features, write_samples
    from pipestill.sampling.writer import pictures
    from pipestill.training.ranks import autocast_type

    card = read_card(source.path)[1]
    recipe = settle(
        run, card, None if tuned is None else json.loads(tuned.file("tuned.json").read_text(encoding="utf-8"))
    )
    labels = labels_of(run, card, dataset)
    loaded = load_model(source.path, weights=run.weights, autocast=autocast_type(run.precision))
    denoiser = place(loaded.denoiser, world.device)
    extractors = None if against is None else _extractors(against, card, run, world)
    if world.leader:
        say(
            f"{name}: {run.images:,} images for each of {len(run.seeds)} seeds, {recipe.sampler} at {recipe.steps} "
            f"steps, {recipe.evaluations} evaluations an image, {world.size} ranks"
        )
    parts = blocks(run.seeds, run.images, run.micro_batch)
    folder = work.state / "blocks"

    def compute(seed: int, items: Tensor, classes: Tensor) -> Tensor:
        return recipe.sample(denoiser, seed=seed, items=items, labels=classes, device=world.device)

    progress = run_blocks(
        lambda block, items, classes: compute(block.seed, items, classes),
        parts,
        labels,
        micro_batch=run.micro_batch,
        folder=folder,
        world=world,
        name=f"sample/{work.key}",
        product=pictures if extractors is None else in_spaces(extractors),
    )
    if not world.leader:
        return None
    height_first = (card.resolution, card.resolution, card.channels)
    staging = work.staging()
    index = {
        "seeds": list(run.seeds),
        "images_per_seed": run.images,
        "evaluations": recipe.evaluations,
        "guidance": run.guidance,
        "sampler": recipe.sampler,
        "steps": recipe.steps,
        "sigmas": [level if math.isfinite(level) else None for level in recipe.sigmas.tolist()],
        "model": {"name": run.model, "payload": source.manifest.payload, "weights": run.weights},
        "classes": list(card.classes),
        "plan": run.plan,
    }
    shown = _repeat(labels, len(run.seeds))
    with writing(staging):
        if extractors is None:
            write_samples(
                staging, read_blocks(folder, parts, height_first), labels=shown, shape=height_first, index=index
            )
        else:
            spaces = {extractor.name: extractor.dimension for extractor in extractors}
            rows, kept = read_blocks(folder, parts, (sum(spaces.values()),)), kept_items(labels, card.filled)
            images = _images_of(kept, compute, run, labels)
            write_features(staging, rows, spaces, kept, images, labels=shown, shape=height_first, index=index)
    total = run.images * len(run.seeds)
    summary = {
        "images": total,
        "seeds": list(run.seeds),
        "plan": run.plan,
        "evaluations": recipe.evaluations,
        "guidance": run.guidance,
        "model": run.model,
        "model_payload": source.manifest.payload,
    }
    artifact = work.publish(staging, summary)
    work.record(finished=True, ranks=world.size, **_timings(progress, total, run, work))
    return artifact


def _extractors(against: Reference, card: ModelCard, run: RunParams, world: World) -> list[Extractor]:
    """The extractors of a reference, if it was made for what this run samples. Raises InputError."""
    against.check_card(card.channels, card.resolution, card.classes)
    return [against.extractor(space, world.device) for space in against.index.spaces]


def _images_of(
    items: list[int], compute: Callable[[int, Tensor, Tensor], Tensor], run: RunParams, labels: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """The first seed's images [n, H, W, C] of some items, sampled once more, in batches of the run's size."""
    import numpy
    import torch

    from pipestill.sampling.writer import pictures

    found = []
    for first in range(0, len(items), run.micro_batch):
        own = items[first : first + run.micro_batch]
        padded = torch.tensor([*own, *[own[-1]] * (run.micro_batch - len(own))])
        x0 = compute(run.seeds[0], padded, torch.from_numpy(labels[padded.numpy()]))
        found.append(pictures(x0[: len(own)]).cpu().numpy())
    return numpy.concatenate(found)


def _timings(progress: Progress, images: int, run: RunParams, work: Work) -> dict[str, Any]:
    """Seconds an image without start-up; where an earlier attempt sampled everything, what it recorded.

    With features the seconds hold their extraction too, so no image's are stated: they would be compared.
    """
    if run.store == "features":
        return {"images": images, "seconds_with_features": round(progress.seconds, 6)}
    earlier = read_record(work.stage, work.key).get("seconds_per_image")
    each = progress.seconds / progress.images if progress.images else earlier
    return {
        "images": images,
        "sampling_seconds": None if each is None else round(each * images, 6),
        "seconds_per_image": each,
    }


def labels_of(run: RunParams, card: ModelCard, dataset: Path | None) -> NDArray[np.int64]:
    """The class of each item, the same for every seed: int64 [images]."""
    import numpy

    from pipestill import mixes
    from pipestill.classes import numbers
    from pipestill.fitting import require_classes
    from pipestill.sampling import plan

    if run.plan == "balanced":
        return mixes.sequence(numpy.isin(range(len(card.classes)), card.filled).astype(numpy.int64), run.images)
    if run.plan == "drawn":
        return plan.drawn(run.images, card.filled)
    if run.plan == "listed":
        return plan.listed(run.images, numbers(run.classes, card.classes, f"classes of model {run.model}"))
    if run.plan == "none":
        return plan.without_classes(run.images)
    if dataset is None:
        raise InputError("plan=data takes the classes' shares from a dataset: give --dataset")
    from pipestill.data.store import open_dataset

    data = open_dataset(dataset)
    require_classes(
        f"model {run.model}", card.classes, dataset, data.classes, "give the dataset that the model was trained on"
    )
    if not data.classes:
        raise InputError(f"plan=data takes shares of classes from {dataset}, which has no labels: use plan=none")
    return mixes.sequence(data.train_counts, run.images)


def _repeat(labels: NDArray[np.int64], times: int) -> NDArray[np.int64]:
    import numpy

    return numpy.tile(labels, times)


def write_pngs(samples: Path, folder: Path) -> None:
    """Writes each image of a samples artefact as `folder/<class>/seed<s>-<item>.png` (no class: `folder/...`).

    Replaces what an earlier call wrote there. Raises InputError if `folder` holds anything else.
    """
    from pipestill.sampling.pictures import png_bytes
    from pipestill.sampling.store import open_samples

    source = open_samples(samples)
    bar = Bar("png", source.count, unit="images")
    with outputs.new_folder(folder, outputs.PNGS) as staging:
        for number in range(source.count):
            seed, item = source.seeds[number // source.images_per_seed], number % source.images_per_seed
            label = int(source.labels[number])
            place = staging if label < 0 else staging / source.index["classes"][label].replace("/", "-")
            place.mkdir(exist_ok=True)
            (place / f"seed{seed}-{item:06d}.png").write_bytes(png_bytes(source.images(number, number + 1)[0]))
            bar.advance()
    bar.close()
