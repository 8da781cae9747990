"""Our extractors as torch-fidelity knows them, so that both measure the same features. Imports torch-fidelity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from pipestill.evaluation.extractors import Extractor


def register(name: str, make: Callable[[], Extractor], dtype: torch.dtype = torch.float32) -> str:
    """Registers an extractor under `name` for `torch_fidelity.calculate_metrics(feature_extractor=name, cuda=…)`.

    `dtype` is the form in which torch-fidelity gets the features: it reckons means and kernels in that precision.
    Returns the name; registering it twice keeps the first.
    """

    class Registered(FeatureExtractorBase):  # type: ignore[misc]
        def __init__(self, given_name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(given_name, features_list)
            self._extractor = make()

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("features",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:  # noqa: ARG004
            return "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        @staticmethod
        def get_dummy_input_for_compile() -> Tensor:
            raise NotImplementedError

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            return (self._extractor(images).to(dtype),)

    if name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(name, Registered)
    return name
