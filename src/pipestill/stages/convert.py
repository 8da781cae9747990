"""Make a model of a fetched file: NVIDIA's EDM pickle or a DMD2 checkpoint becomes a Diffusers folder, and back.

Nothing in the file is run. Class names are those of the dataset, in its order: the file knows their number alone. With
--to-edm, writes a model's weights as a plain state dict in EDM's names.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

from pipestill import artifacts, outputs
from pipestill.artifacts import Artifact
from pipestill.config import ConvertParams
from pipestill.errors import InputError
from pipestill.outputs import ArtifactKind, Written
from pipestill.progress import say
from pipestill.stages import common
from pipestill.work import open_work

VERSION = 2
EXAMPLES = """
  pipestill convert --name edm --input artifacts/fetched/edm --dataset artifacts/dataset --output artifacts/models/edm
  pipestill convert --to-edm edm.safetensors --model artifacts/models/edm
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_common(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--output", type=Written(ArtifactKind("model")), metavar="DIR", help="where the model artefact goes"
    )
    what.add_argument(
        "--to-edm",
        type=Written(outputs.EDM_WEIGHTS),
        metavar="FILE",
        help="write the weights of --model there (.safetensors or .pt)",
    )
    parser.add_argument("--name", metavar="NAME", help="the entry of `converted`")
    parser.add_argument("--input", type=Path, metavar="DIR", help="the fetched files")
    parser.add_argument("--dataset", type=Path, metavar="DIR", help="dataset artefact whose classes the model knows")
    parser.add_argument("--model", type=Path, metavar="DIR", help="with --to-edm: the model artefact")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="with --to-edm: which weights")


def main(options: argparse.Namespace) -> int:
    wanted = ("model",) if options.to_edm is not None else ("name", "input", "dataset")
    for name in wanted:
        if getattr(options, name) is None:
            raise InputError(f"--{name} is needed too (see pipestill convert --help)")
    if options.to_edm is not None:
        to_edm(options.model, options.to_edm, weights=options.weights)
        return 0
    params = common.load_params(options)
    entry = common.entry(params.converted, options.name, "converted")
    convert(entry, name=options.name, source=options.input, dataset=options.dataset, output=options.output)
    return 0


def convert(params: ConvertParams, *, name: str, source: Path, dataset: Path, output: Path) -> Artifact:
    """Converts the network that the parameters name; returns its artefact, exact to 1e-5 in fp32.

    Raises InputError: a file of another kind, hostile or damaged; a network that does not fit the dataset.
    """
    files = artifacts.read(source, "files")
    data = artifacts.read(dataset, "dataset")
    with open_work(
        kind="model",
        stage="convert",
        version=VERSION,
        parameters=params.plain(),
        inputs={"input": files.as_input, "dataset": data.as_input},
        output=output,
    ) as work:
        if work.done is not None:
            say(f"{output} is there and verifies: nothing to do")
            return work.done

        from pipestill.data.store import open_dataset
        from pipestill.networks import adm, checkpoints
        from pipestill.networks.model import ModelCard, NativeSchedule, save_model
        from pipestill.networks.unet import parameter_count

        path = files.file(params.file)
        say(f"{name}: reading {path} as data")
        found = checkpoints.find(path, params.network)
        opened, layout = open_dataset(dataset), found.layout
        _check_fit(layout, opened.resolution, opened.channels, len(opened.classes), path, dataset)
        if found.sigma_data not in (None, params.denoiser.sigma_data):
            raise InputError(
                f"{path} has sigma_data={found.sigma_data}: set converted.{name}.denoiser.sigma_data to it"
            )
        if found.augmented:
            say(f"{name}: its augmentation layer (map_augment), which inference does not use, is left out")
        state = adm.to_diffusers(found.tensors, layout, str(path))
        # dropout 0: the published recipe runs teacher, fake score and student without it, though in training mode
        unet = adm.build(layout)
        card = ModelCard(
            role="student" if params.native else "teacher",
            resolution=layout.resolution,
            channels=layout.channels,
            classes=opened.classes,
            unconditional_branch=bool(found.unconditional_branch),
            denoiser=params.denoiser.plain(),
            native=NativeSchedule(**params.native.plain()) if params.native else None,
            empty=opened.empty,
        )
        staging = work.staging()
        save_model(staging, card, unet, {"ema": state})
        artifact = work.publish(staging, {"parameters": parameter_count(unet)} | adm.describe(layout))
        work.record(finished=True)
    branch = "an unconditional branch" if card.unconditional_branch else "no unconditional branch"
    say(f"{output}: {parameter_count(unet):,} parameters, {layout.classes} classes, {branch}")
    return artifact


def _check_fit(layout: object, resolution: int, channels: int, classes: int, path: Path, dataset: Path) -> None:
    """Raises InputError where the network makes other images, or knows another number of classes, than the dataset."""
    for what, own in (("resolution", resolution), ("channels", channels), ("classes", classes)):
        theirs = getattr(layout, what)
        if theirs != own:
            raise InputError(f"{path} has {what} {theirs}, {dataset} has {own}: give a dataset of the network's kind")


def to_edm(model: Path, file: Path, *, weights: str = "ema") -> None:
    """Writes a model's weights in EDM's names, as EDMPrecond's state dict has them.

    Raises InputError for a model of another architecture, and if `file` is there and was not written by this function.
    """
    import torch
    from safetensors.torch import save_file

    from pipestill.networks import adm
    from pipestill.networks.model import load_model

    loaded = load_model(model, weights="raw" if weights == "raw" else "ema")
    layout = adm.layout_of(loaded.unet, str(model))
    tensors = {f"model.{name}": tensor for name, tensor in adm.to_edm(loaded.unet.state_dict(), layout).items()}
    outputs.require_apart("--to-edm", file, [model])
    with outputs.new_file(file, outputs.EDM_WEIGHTS) as partial:
        if file.suffix == ".safetensors":
            save_file(tensors, partial, metadata={"made_by": outputs.MADE_BY})
        else:
            with partial.open("wb") as stream:  # given a path, torch would write its name into the file
                torch.save(tensors, stream)
            with zipfile.ZipFile(partial, "a") as archive:
                archive.comment = outputs.MADE_BY.encode()
    say(f"{file}: {len(tensors)} tensors")
