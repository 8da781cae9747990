"""Model folders: Diffusers networks in `unet/` (EMA weights) and `unet_raw/`, and `model.json`, their use.

`UNet2DModel.from_pretrained(folder, subfolder="unet")` reads what is written here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipestill import artifacts
from pipestill.artifacts import Artifact
from pipestill.config import AnyDenoiserParams, EdmParams, FlowParams, VpParams, denoiser_params
from pipestill.diffusion.conditions import ClassCondition, Condition, NoCondition
from pipestill.diffusion.denoiser import Denoiser
from pipestill.diffusion.edm import EDM
from pipestill.diffusion.flow import Flow
from pipestill.diffusion.schedules import Spacing, karras
from pipestill.diffusion.vp import VP
from pipestill.errors import InputError
from pipestill.networks.schedulers import ddpm_scheduler, training_sigmas
from pipestill.networks.unet import NETWORKS
from pipestill.networks.unet2d import UNet2DModel
from pipestill.work import writing

WEIGHTS = "diffusion_pytorch_model.safetensors"  # as Diffusers calls them
SUBFOLDERS = {"ema": "unet", "raw": "unet_raw"}


@dataclass(frozen=True)
class NativeSchedule:
    """How a student was trained to be sampled: its steps, transition, and noise levels.

    Those are Karras's in a range, or some of its denoiser's own, which may begin with pure noise.
    """

    steps: int
    transition: Literal["euler", "renoise"]
    sigma_max: float | None
    sigma_min: float | None
    rho: float
    spacing: Literal["karras"] | Spacing = "karras"

    def sigmas(self, denoiser: Denoiser) -> Tensor:
        """[steps + 1] float64, ending in 0. Raises ValueError where the denoiser has no such steps."""
        if self.spacing != "karras":
            return denoiser.spaced(self.steps, self.spacing)
        assert self.sigma_min is not None  # StudentParams sees to it
        assert self.sigma_max is not None
        return karras(self.steps, self.sigma_min, self.sigma_max, self.rho)


@dataclass(frozen=True)
class ModelCard:
    """What a model is for: images [channels, resolution, resolution] in [-1, 1], classes by name, its adapter."""

    role: Literal["teacher", "student"]
    resolution: int
    channels: int
    classes: tuple[str, ...]  # empty: unconditional
    unconditional_branch: bool  # whether 'no class' was trained, so that guidance has a meaning
    denoiser: dict[str, Any]
    native: NativeSchedule | None = None
    empty: tuple[str, ...] = ()  # classes that had no image to train on

    @property
    def filled(self) -> list[int]:
        """The numbers of the classes that had images."""
        return [number for number, name in enumerate(self.classes) if name not in self.empty]

    def condition(self, labels: Tensor) -> Condition:
        """Labels [N] int64 as this model takes them."""
        if not self.classes:
            return NoCondition(labels.shape[0])
        return ClassCondition(labels, len(self.classes) if self.unconditional_branch else None)


def card_of(body: Mapping[str, Any]) -> ModelCard:
    """The card from plain values, as `model.json` holds them. Raises TypeError or KeyError for other values."""
    values = dict(body)
    native = values.pop("native")
    values["classes"], values["empty"] = tuple(values["classes"]), tuple(values.get("empty", ()))
    return ModelCard(**values, native=None if native is None else NativeSchedule(**native))


@dataclass(frozen=True)
class Model:
    """A loaded model: its denoiser on a device, its card, and the artefact that it came from."""

    denoiser: Denoiser
    card: ModelCard
    artifact: Artifact

    @property
    def unet(self) -> UNet2DModel:
        return self.denoiser.network


def wrap(network: nn.Module, params: AnyDenoiserParams, autocast: torch.dtype | None = None) -> Denoiser:
    """The adapter that the parameters name, around a network."""
    if isinstance(params, EdmParams):
        return EDM(
            network,
            sigma_data=params.sigma_data,
            sigma_min=params.sigma_min,
            sigma_max=params.sigma_max,
            p_mean=params.p_mean,
            p_std=params.p_std,
            autocast=autocast,
        )
    if isinstance(params, FlowParams):
        return Flow(
            network,
            sigma_min=params.sigma_min,
            p_mean=params.p_mean,
            p_std=params.p_std,
            shift=params.shift,
            autocast=autocast,
        )
    return VP(
        network,
        sigmas=training_sigmas(params),
        prediction=params.prediction,
        time=params.time,
        weighting=params.weighting,
        snr_gamma=params.snr_gamma,
        autocast=autocast,
    )


def save_model(folder: Path, card: ModelCard, unet: UNet2DModel, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes card and network; `weights` maps `ema` and `raw` to state dicts of `unet`. The same bytes each time.

    The state dicts may share memory with `unet`, which keeps its weights. Raises SurroundingsError (full disk).
    """
    live = unet.state_dict()
    own = on_host(live)
    try:
        with writing(folder):
            (folder / "model.json").write_text(_json(asdict(card)), encoding="utf-8")
            (folder / "model_index.json").write_text(_json(_pipeline_index(card)), encoding="utf-8")
            for which, state in weights.items():  # those that are the network's own have been loaded over since
                mine = {name for name, tensor in state.items() if name in live and _same(tensor, live[name])}
                unet.load_state_dict({name: own[name] if name in mine else state[name] for name in state})
                unet.save_pretrained(folder / SUBFOLDERS[which], safe_serialization=True)
            params = denoiser_params(card.denoiser)
            if isinstance(params, VpParams):
                ddpm_scheduler(params).save_pretrained(folder / "scheduler")
    finally:
        unet.load_state_dict(own)


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the host's memory."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and type lie in the same memory."""
    return one.device == other.device and one.data_ptr() == other.data_ptr()


def _json(body: Mapping[str, Any]) -> str:
    return json.dumps(body, indent=1, sort_keys=True) + "\n"


def _pipeline_index(card: ModelCard) -> dict[str, Any]:
    """What makes the folder a Diffusers pipeline: `pipestill.PixelPipeline.from_pretrained(folder)` loads it."""
    return {"_class_name": "PixelPipeline", "card": asdict(card), "unet": ["diffusers", "UNet2DModel"]}


def read_card(path: Path) -> tuple[Artifact, ModelCard]:
    """The card of a model artefact, without its weights. Raises InputError."""
    artifact = artifacts.read(path, "model")
    try:
        return artifact, card_of(json.loads(artifact.file("model.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path / 'model.json'} cannot be read ({error}): rebuild the model") from error


def load_unet(folder: Path, **keywords: Any) -> UNet2DModel:
    """The network in a folder, by the class that its config names. Raises InputError for any other class."""
    kind = _network_class(folder / "config.json")
    if keywords or not (folder / WEIGHTS).exists():  # in several files where they are many
        return kind.from_pretrained(folder, local_files_only=True, **({"low_cpu_mem_usage": False} | keywords))
    unet: UNet2DModel = kind.from_config(kind.load_config(folder, local_files_only=True))  # seconds sooner
    unet.load_state_dict(load_file(folder / WEIGHTS))
    return unet.eval()


def _network_class(config: Path) -> type[UNet2DModel]:
    """The class that a network's config names: another one would load, and compute something else."""
    named = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    if named not in NETWORKS:
        raise InputError(f"{config} is of the class {named}, one of {', '.join(NETWORKS)} was expected")
    return NETWORKS[named]


def last_weights(artifact: Artifact) -> Literal["ema", "raw"]:
    """Which weights to continue training from: the raw ones; converted models only have one set, stored as `ema`."""
    return "raw" if f"{SUBFOLDERS['raw']}/config.json" in artifact.manifest.files else "ema"


def load_model(
    path: Path,
    *,
    weights: Literal["ema", "raw"] = "ema",
    device: torch.device | None = None,
    autocast: torch.dtype | None = None,
) -> Model:
    """Loads a model artefact for use: eval mode, no gradients. Raises InputError."""
    artifact, card = read_card(path)
    unet = load_unet(artifact.file(f"{SUBFOLDERS[weights]}/config.json").parent)
    denoiser = wrap(unet, denoiser_params(card.denoiser), autocast)
    denoiser.requires_grad_(False).eval().to(device or torch.device("cpu"))
    return Model(denoiser, card, artifact)
