"""A model folder as a Diffusers pipeline: loaded with `from_pretrained`, called with class labels, gives pictures.

It samples as `pipestill sample` does, block by block, so that the pictures are the same. Reads the model's folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipestill.classes import by_name
from pipestill.config import ChurnParams, RunParams, check_section, denoiser_params
from pipestill.errors import InputError
from pipestill.modes import follow_umask
from pipestill.networks.model import ModelCard, card_of, load_unet, wrap
from pipestill.networks.unet2d import UNet2DModel
from pipestill.sampling.items import to_uint8
from pipestill.sampling.plan import UNCONDITIONAL, blocks
from pipestill.sampling.recipe import settle

TEACHERS_STEPS = 40  # of Heun's sampler, 79 evaluations, where a teacher is called without a number


class PixelPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Class-conditional images from a student or a teacher.

        pipeline = PixelPipeline.from_pretrained("artifacts/models/student-4")
        images = pipeline(["3", "7"], generator=torch.Generator().manual_seed(0)).images

    A student walks the steps that it was distilled for; a teacher takes Heun's sampler over its own sigma range. The
    picture of place i is a function of the seed, i, its label and the settings: that of item i of `pipestill sample`
    with that seed (and as many threads, on the same kind of machine).
    """

    def __init__(self, unet: UNet2DModel, card: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.register_modules(unet=unet)
        self.register_to_config(card=card)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **keywords: Any) -> PixelPipeline:
        """Loads a model artefact or an exported model from a folder; `torch_dtype` as in Diffusers.

        Raises InputError where there is none, or its network is of another class.
        """
        if not (Path(folder) / "model_index.json").is_file():
            raise InputError(f"{folder} is no model folder: it has no model_index.json")
        index = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
        return cls(load_unet(Path(folder) / "unet", **keywords).eval(), index["card"])

    def save_pretrained(self, save_directory: str | Path, **keywords: Any) -> None:
        """Writes a folder that `from_pretrained` loads."""
        super().save_pretrained(save_directory, **keywords)
        index = Path(save_directory) / "model_index.json"
        body = json.loads(index.read_text(encoding="utf-8"))
        index.write_text(json.dumps(body | {"unet": ["diffusers", "UNet2DModel"]}, indent=1) + "\n", encoding="utf-8")
        follow_umask(Path(save_directory))

    @property
    def card(self) -> ModelCard:
        """What the model is for: classes by name, resolution, its own schedule."""
        return card_of(self.config.card)

    @torch.inference_mode()
    def __call__(
        self,
        class_labels: Sequence[int | str] | int | str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | int = 0,
        *,
        num_images: int | None = None,
        sampler: Literal["native", "euler", "heun", "heun-churn", "2m", "renoise", "ddpm", "ddim-linear-alpha"]
        | None = None,
        spacing: Literal["karras", "trailing", "leading", "linspace"] | None = None,
        sigma_max: float | None = None,
        sigma_min: float | None = None,
        rho: float = 7.0,
        churn: Mapping[str, float] | None = None,
        clip: bool = False,
        output_type: Literal["pil", "np", "pt", "uint8"] = "pil",
        micro_batch: int = 64,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> ImagePipelineOutput:
        """Samples one image for each class label (by index or name), or `num_images` of all classes in turn.

        `generator` gives the seed, a generator its initial one: pictures belong to (seed, place), so that no generator
        is advanced. A teacher is sampled by Heun's method, from pure noise if it was trained for that, unless `sampler`
        and `spacing` say otherwise; these, `sigma_max`, `sigma_min`, `rho`, `churn` and `clip` are those of a run.
        `guidance_scale` w means uncond + w·(cond - uncond), 1 none. `output_type`: `pil`; `np` float32 [N, H, W, C] and
        `pt` [N, C, H, W] in [0, 1]; `uint8` as stored by `pipestill sample`, [N, H, W, C].

        Raises InputError: an unknown class, steps other than a student's own, guidance without an unconditional branch,
        a value that a run could not have either.
        """
        card = self.card
        if any(count is not None and count < 1 for count in (micro_batch, num_images, num_inference_steps)):
            raise InputError("micro_batch, num_images and num_inference_steps are at least 1")
        labels = self._labels(class_labels, num_images, card)
        chosen = sampler or ("native" if card.native is not None else "heun")
        steps = num_inference_steps or (None if chosen == "native" else TEACHERS_STEPS)
        denoiser = wrap(self.unet, denoiser_params(card.denoiser), torch.bfloat16 if precision == "bf16" else None)
        own: Literal["trailing", "karras"] = "karras"
        if math.isinf(denoiser.sigma_max) and chosen != "native" and sigma_max is None:
            own = "trailing"
        unlabelled = not card.classes or bool((labels == UNCONDITIONAL).all())
        settings = {
            "model": "model",
            "sigmas": "models/model",
            "sampler": chosen,
            "steps": steps,
            "spacing": spacing or own,
            "sigma_max": sigma_max,
            "sigma_min": sigma_min,
            "rho": rho,
            "churn": None if churn is None else check_section(ChurnParams, churn, "churn"),
            "clip": clip,
            "guidance": guidance_scale,
            "plan": "none" if unlabelled else "balanced",
        }
        run = check_section(RunParams, settings, "PixelPipeline")
        recipe = settle(run, card)
        seed = generator.initial_seed() if isinstance(generator, torch.Generator) else generator
        made = []
        with self.progress_bar(total=len(labels)) as bar:
            for block in blocks([seed], len(labels), micro_batch):
                items = torch.arange(block.first, block.first + micro_batch)  # padded, as pipestill sample does
                rows = items.clamp(max=block.first + block.count - 1)
                x0 = recipe.sample(denoiser, seed=seed, items=items, labels=labels[rows], device=self._execution_device)
                made.append(to_uint8(x0)[: block.count].permute(0, 2, 3, 1).cpu())
                bar.update(block.count)
        return ImagePipelineOutput(images=_as(torch.cat(made), output_type))

    @staticmethod
    def _labels(given: Sequence[int | str] | int | str | None, count: int | None, card: ModelCard) -> Tensor:
        """Labels [N] int64: those given, or all classes that had images in turn; -1 without classes."""
        if given is None:
            total = 1 if count is None else count
            filled = torch.tensor(card.filled)
            return filled[torch.arange(total) % len(filled)] if card.classes else torch.full((total,), UNCONDITIONAL)
        named = [given] if isinstance(given, (int, str)) else list(given)
        if not named:
            raise InputError("class_labels is empty: give one label for each image")
        if count is not None and count != len(named):
            raise InputError(f"num_images={count}, but {len(named)} class labels are given: leave one of them out")
        found = []
        for label in named:
            if isinstance(label, str):
                label = by_name(label, card.classes, "class_labels")
            if type(label) is not int:
                raise InputError(f"class {label!r}: an index or a name was expected")
            if not 0 <= label < len(card.classes):
                raise InputError(f"class {label}: the model's classes are 0 to {len(card.classes) - 1}")
            found.append(label)
        return torch.tensor(found)


def _as(images: Tensor, output_type: str) -> list[Image.Image] | NDArray[np.float32] | NDArray[np.uint8] | Tensor:
    """uint8 [N, H, W, C] as the caller wants it. Raises ValueError for an unknown type."""
    if output_type == "pil":
        return [
            Image.fromarray(image.squeeze(-1).numpy() if image.shape[-1] == 1 else image.numpy()) for image in images
        ]
    if output_type == "uint8":
        return images.numpy()
    if output_type == "pt":
        return images.permute(0, 3, 1, 2).float() / 255
    if output_type == "np":
        floats: NDArray[np.float32] = np.divide(images.numpy(), 255, dtype=np.float32)
        return floats
    raise ValueError(f"output_type={output_type}: pil, np, pt or uint8")
