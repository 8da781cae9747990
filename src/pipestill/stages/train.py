"""Train a teacher: a class-conditional denoiser on the dataset's train part, over any number of ranks.

Goes on from its newest saved state by itself; a changed parameter or input begins anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipestill import artifacts
from pipestill.config import OperationParams, TeacherParams
from pipestill.errors import InputError
from pipestill.launch import Spread
from pipestill.progress import say
from pipestill.stages.common import (
    add_common,
    add_launch,
    entry,
    load_params,
    run_training,
    spread_of,
    summary_of,
    work_over_ranks,
)
from pipestill.work import writing

if TYPE_CHECKING:
    from pipestill.artifacts import Artifact
    from pipestill.config import AnyDenoiserParams
    from pipestill.config.fields import Section
    from pipestill.data.store import Dataset
    from pipestill.diffusion.denoiser import Denoiser
    from pipestill.distributed import World
    from pipestill.networks.model import Model, ModelCard
    from pipestill.networks.unet2d import UNet2DModel
    from pipestill.training.teacher import TeacherTraining

VERSION = 5
EXAMPLES = """\
  pipestill train --name teacher --dataset artifacts/dataset --output artifacts/models/teacher
  pipestill train --name teacher --dataset artifacts/dataset --output /tmp/teacher --ranks 2 \\
      teachers.teacher.training.iterations=500
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, makes="model", name="which entry of `teachers`")
    parser.add_argument("--dataset", type=Path, required=True, metavar="DIR", help="dataset artefact")
    parser.add_argument("--start", type=Path, metavar="DIR", help="where the model is that `start` names")
    add_launch(parser)


def spread(options: argparse.Namespace) -> Spread:
    return spread_of(options, "train")


def main(options: argparse.Namespace) -> None:
    params = load_params(options)
    teacher = entry(params.teachers, options.name, "teachers")
    if teacher.begins_with is not None and options.start is None:
        raise InputError(f"teachers.{options.name} starts from {teacher.start}: give it as --start DIR")
    train(
        teacher,
        name=options.name,
        dataset=options.dataset,
        start=options.start if teacher.begins_with is not None else None,
        output=options.output,
        operation=params.operation,
    )


def train(
    teacher: TeacherParams,
    *,
    name: str,
    dataset: Path,
    output: Path,
    operation: OperationParams,
    start: Path | None = None,
) -> Artifact | None:
    """Trains the teacher that the parameters describe, from the weights of `start` where there is one.

    Returns its artefact on the leader.

    Raises InputError (data and network do not fit), SurroundingsError (NaN, full disk, lost rank) and Stopped.
    """
    inputs = {"dataset": artifacts.read(dataset, "dataset").as_input}
    if start is not None:
        inputs["start"] = artifacts.read(start, "model").as_input
    with work_over_ranks(
        kind="model",
        stage="train",
        version=VERSION,
        parameters=teacher.plain(),
        inputs=inputs,
        output=output,
        threads=teacher.training.threads,
        operation=operation,
    ) as (world, work):
        if work.done is not None:
            return work.done

        from pipestill.data.store import open_dataset
        from pipestill.networks.model import save_model
        from pipestill.networks.unet import parameter_count

        data = open_dataset(dataset)
        training, denoiser, card = prepared(teacher, data, world, operation.cache, start=start)
        unet = denoiser.network
        if world.leader:
            say(
                f"{name}: {parameter_count(unet):,} parameters, {len(data.split['train']):,} images, {world.size} ranks"
            )
        curves = run_training(training, denoiser, card, work, world, operation, name=name)
        if not world.leader:
            return None
        staging = work.staging()
        save_model(staging, card, unet, {"ema": training.ema.tensors, "raw": unet.state_dict()})
        with writing(staging):
            curves.write(staging / "curves.csv")
        artifact = work.publish(staging, summary_of(training, parameters=parameter_count(unet), **curves.last()))
        work.record(finished=True, updates=teacher.training.iterations, ranks=world.size)
        return artifact


def prepared(
    teacher: TeacherParams,
    data: Dataset,
    world: World,
    cache: Literal["device", "host", "none"],
    *,
    start: Path | None = None,
) -> tuple[TeacherTraining, Denoiser, ModelCard]:
    """The training on this rank's device, ready for its first update; its denoiser and the card of its model.

    Raises InputError where network, data, `start` and ranks do not fit.
    """
    from pipestill.networks.model import ModelCard, last_weights, load_model, wrap
    from pipestill.training.ranks import autocast_type, prepare, seed_torch
    from pipestill.training.teacher import TeacherTraining

    seed_torch(teacher.training.seed, 0, 0)  # the weights' start
    model = None if start is None else load_model(start, weights=last_weights(artifacts.read(start, "model")))
    settings = resolved(teacher.denoiser, data, model)
    unet = _built(teacher, data) if model is None else _begun(model, settings, data)
    card = ModelCard(
        role="teacher",
        resolution=data.resolution,
        channels=data.channels,
        classes=data.classes,
        unconditional_branch=bool(data.classes) and teacher.training.label_dropout > 0,
        denoiser=settings.plain(),
        empty=data.empty,
    )
    denoiser = wrap(unet, settings, autocast_type(teacher.training.precision))
    prepare(denoiser, teacher.training, world)
    return TeacherTraining(denoiser, card, data, teacher.training, world, cache), denoiser, card


def _built(teacher: TeacherParams, data: Dataset) -> UNet2DModel:
    """A network with random weights, of the size that the parameters state."""
    from pipestill.networks.unet import build_unet

    assert teacher.network is not None  # checked with the parameters
    classes = len(data.classes) or None
    return build_unet(teacher.network, resolution=data.resolution, channels=data.channels, classes=classes)


def resolved(params: Section, data: Dataset, start: Model | None = None) -> AnyDenoiserParams:
    """A teacher's denoiser with `sigma_data: data` as a number: that of the model it starts from, or the measured one.

    Raises InputError if there is nothing to measure.
    """
    from pipestill.config import TrainedEdmParams, denoiser_params

    body = params.plain()
    if isinstance(params, TrainedEdmParams) and params.sigma_data == "data":
        body["sigma_data"] = data.pixel_std if start is None else start.card.denoiser.get("sigma_data", data.pixel_std)
        if not body["sigma_data"]:
            raise InputError(f"all train pixels of {data.artifact.path} are equal: set the denoiser's sigma_data")
    return denoiser_params(body)


def _begun(model: Model, settings: AnyDenoiserParams, data: Dataset) -> UNet2DModel:
    """The network of a model with its raw weights, the row for 'no class' included.

    The raw weights are where its training stopped; the average lags behind them and starts over here. Raises InputError
    if model, dataset and denoiser do not fit.
    """
    from pipestill.config import denoiser_params
    from pipestill.fitting import require_fit

    start = model.artifact.path
    require_fit(start, model.card, data.artifact.path, data, "start from a model of such images")
    theirs = denoiser_params(model.card.denoiser).plain()
    own = settings.plain()
    for field in ("kind", *denoiser_params(model.card.denoiser).learnt):
        if own.get(field) != theirs[field]:
            raise InputError(f"{start} has {field}={theirs[field]}: set the teacher's denoiser to it")
    return model.unet.requires_grad_(True)
