"""Model artefacts with random weights: 8x8 images, a few thousand parameters, made in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch

from pipestill.artifacts import Artifact, Manifest, describe_files, publish
from pipestill.config import AnyDenoiserParams, EdmParams, NetworkParams
from pipestill.networks.model import ModelCard, NativeSchedule, save_model
from pipestill.networks.unet import build_unet

CLASSES = ("nought", "one", "two")


def make_model(
    path: Path,
    *,
    classes: tuple[str, ...] = CLASSES,
    unconditional: bool = True,
    native: NativeSchedule | None = None,
    seed: int = 0,
    broken: bool = False,
    resolution: int = 8,
    channels: int = 1,
    sigma_data: float = 0.5,
    denoiser: AnyDenoiserParams | None = None,
) -> Artifact:
    """Publishes a model artefact; with `native` it is a student, `broken` puts a NaN into its last bias."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = NetworkParams(channels=(8, 16), layers=1, norm_groups=4)
        unet = build_unet(network, resolution=resolution, channels=channels, classes=len(classes) or None)
    if broken:
        unet.conv_out.bias.data.fill_(float("nan"))
    card = ModelCard(
        role="teacher" if native is None else "student",
        resolution=resolution,
        channels=channels,
        classes=classes,
        unconditional_branch=unconditional and bool(classes),
        denoiser=(denoiser or EdmParams(sigma_data=sigma_data)).plain(),
        native=native,
    )
    staging = path.with_name(f".{path.name}.partial")
    staging.mkdir(parents=True)
    weights = unet.state_dict()
    save_model(staging, card, unet, {"ema": weights, "raw": {name: 0.9 * tensor for name, tensor in weights.items()}})
    manifest = Manifest("model", "train", 1, {"seed": seed}, {}, describe_files(staging))
    return publish(staging, path, manifest)
