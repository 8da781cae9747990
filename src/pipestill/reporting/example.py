"""The call in a model card's example: the settings that its metrics were measured with.

Pure functions of parameters to the text of Python arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipestill.config import RunParams

LABELS = 8


@dataclass(frozen=True)
class Example:
    """A call of `PixelPipeline` as text; `run` is the measured run whose first images it gives, "" for none."""

    call: str
    run: str = ""
    threads: int = 1


def unmeasured(classes: Sequence[int]) -> Example:
    """The call for a model without metrics: its own steps, no guidance, the first of its classes."""
    labels = list(classes[:LABELS])
    return Example(f"{labels}, generator=0" if labels else f"num_images={LABELS}, generator=0")


def measured(name: str, run: RunParams, labels: Sequence[int], tuned: Mapping[str, Any] | None) -> Example:
    """The call that gives the first images of a run, of classes `labels`; `tuned` is the sigma range chosen for it."""
    first = list(labels[:LABELS])
    words = [f"num_images={len(first)}" if -1 in first else f"{first}", f"generator={run.seeds[0]}"]
    given = {
        "sampler": run.sampler,
        "num_inference_steps": run.steps,
        "guidance_scale": run.guidance,
        "spacing": run.spacing,
        "sigma_max": run.sigma_max or (tuned or {}).get("sigma_max"),
        "sigma_min": run.sigma_min or (tuned or {}).get("sigma_min"),
        "rho": run.rho,
        "churn": None if run.churn is None else run.churn.plain(),
        "clip": run.clip,
        "micro_batch": run.micro_batch,
        "precision": run.precision,
    }
    usual = {"sampler": "native", "guidance_scale": 1.0, "rho": 7.0, "clip": False, "micro_batch": 64}
    usual |= {"precision": "fp32", "spacing": "karras"}
    words += [f"{key}={value!r}" for key, value in given.items() if value is not None and value != usual.get(key)]
    return Example(", ".join(words), name, run.threads)
