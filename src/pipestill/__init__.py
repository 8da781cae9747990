"""pipestill distils diffusion models into few-step students with measured quality, reproducibly.

The stages are functions: `build_dataset`, `build_reference`, `train`, `tune`, `distill`, `sample`, `evaluate` and
`report` take typed parameters and paths, and return the artefact that they made. `load_model` opens a model,
`PixelPipeline` one as a Diffusers pipeline, `open_samples` its pictures, `load_params` a parameter file. Nothing heavy
is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "build_dataset": ("pipestill.stages.dataset", "build"),
    "build_reference": ("pipestill.stages.reference", "build_reference"),
    "train": ("pipestill.stages.train", "train"),
    "tune": ("pipestill.stages.tune", "tune"),
    "distill": ("pipestill.stages.distill", "distill"),
    "sample": ("pipestill.stages.sample", "sample"),
    "evaluate": ("pipestill.stages.evaluate", "evaluate"),
    "report": ("pipestill.stages.report", "report"),
    "load_params": ("pipestill.config", "load"),
    "load_model": ("pipestill.networks.model", "load_model"),
    "open_samples": ("pipestill.sampling.store", "open_samples"),
    "PixelPipeline": ("pipestill.sampling.pipeline", "PixelPipeline"),
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"pipestill has no {name}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
