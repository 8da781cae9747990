"""The few metrics of a run that git and DVC keep as metrics/RUN.json; the evaluation artefact has all of them.

Pure. The same artefact gives the same bytes on every machine: no seconds, five significant digits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

DIGITS = 5
KEYS = ("class_accuracy", "diversity", "evaluations", "guidance", "images", "seeds")


def headline(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Each Fréchet distance, class accuracy and diversity, what the run was, and notes on its class mix if any."""
    kept = {key: value for key, value in metrics.items() if key.startswith("fd_") or key in KEYS}
    kept |= {key: metrics[key] for key in ("mix", "notes") if metrics.get(key)}
    return {key: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value for key, value in kept.items()}


def file_of(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The text of a metrics file: a run's, or the floor's, whose further counts follow in a list."""
    first, *others = map(headline, metrics)
    body = first | ({"counts": [first, *others]} if others else {})
    return json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def is_file_of(body: Any, metrics: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the body of a metrics file is what `file_of` writes of these metrics, further counts included."""
    return bool(metrics) and body == json.loads(file_of(metrics))
