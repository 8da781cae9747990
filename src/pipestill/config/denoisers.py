"""Parameters of denoisers: which adapter stands between a network and the samplers, and its noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter, model_validator

from pipestill.config.fields import Section, Sigma

BetaOfSchedule = Annotated[float, Field(gt=0, lt=1)]


def _number_or_data(value: Any) -> Any:
    """One complaint where a union would make two."""
    try:
        fits = value == "data" or 0 < float(value) <= 1e6
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"{value} is neither a number above 0 nor 'data'")
    return value


SigmaData = Annotated[Sigma | Literal["data"], BeforeValidator(_number_or_data)]


class TrainedEdmParams(Section):
    """EDM's preconditioning (Karras et al. 2022, table 1): the network predicts a mixture of x0 and noise."""

    kind: Literal["edm"] = "edm"
    learnt: ClassVar = ("sigma_data",)  # what a network's weights depend on
    sigma_data: SigmaData = "data"  # data: measured on the train images, or that of the model in `start`
    sigma_min: Sigma = 0.002
    sigma_max: Sigma = 80.0
    p_mean: float = -1.2  # training noise: ln sigma ~ N(p_mean, p_std²)
    p_std: Annotated[float, Field(gt=0)] = 1.2


class EdmParams(TrainedEdmParams):
    """EDM's preconditioning of a model that exists: its sigma_data is a number."""

    sigma_data: Sigma = 0.5


class VpParams(Section):
    """DDPM (Ho et al. 2020): the network predicts eps or v at a step of one of Diffusers' noise schedules."""

    kind: Literal["vp"]
    learnt: ClassVar = ("prediction", "schedule", "steps", "beta_start", "beta_end", "zero_terminal_snr")
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"  # the last is the cosine one
    steps: Annotated[int, Field(ge=2)] = 1000
    beta_start: BetaOfSchedule = 1e-4  # of the linear schedules
    beta_end: BetaOfSchedule = 0.02
    zero_terminal_snr: bool = False  # the last step is pure noise (Lin et al. 2023); needs v_prediction
    time: Literal["fractional", "snapped"] = "fractional"  # which t a noise level between two steps has
    weighting: Literal["prediction", "min_snr"] = "prediction"  # the plain error of the prediction, or Min-SNR
    snr_gamma: Annotated[float, Field(gt=0)] = 5.0  # of Min-SNR (Hang et al. 2023)

    @model_validator(mode="after")
    def _noise_says_something(self) -> Self:
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError("zero_terminal_snr needs prediction=v_prediction: the eps of pure noise says nothing")
        if self.zero_terminal_snr and self.weighting == "min_snr":
            raise ValueError("weighting=min_snr gives pure noise no weight: with zero_terminal_snr use prediction")
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start={self.beta_start} lies above beta_end={self.beta_end}")
        return self


class FlowParams(Section):
    """Flow matching along the straight path (Lipman et al. 2023): the network predicts v = eps - x0."""

    kind: Literal["flow"]
    learnt: ClassVar = ()
    sigma_min: Sigma = 0.002
    p_mean: float = 0.0  # training noise: ln sigma = logit t ~ N(p_mean, p_std²)
    p_std: Annotated[float, Field(gt=0)] = 1.0
    shift: Annotated[float, Field(gt=0)] = 1.0  # multiplies the noise levels of a sampler's steps


def _kind(given: Any) -> str:
    """Which adapter a section describes: EDM where it does not say."""
    return str(given.get("kind", "edm") if isinstance(given, Mapping) else getattr(given, "kind", given))


# The adapter between network and sampler coordinates (design: x = x0 + sigma * eps), of a model that exists.
AnyDenoiserParams = EdmParams | VpParams | FlowParams
_DENOISER: TypeAdapter[AnyDenoiserParams] = TypeAdapter(
    Annotated[
        Annotated[EdmParams, Tag("edm")] | Annotated[VpParams, Tag("vp")] | Annotated[FlowParams, Tag("flow")],
        Discriminator(_kind),
    ]
)
# The same, of a teacher that is to be trained.
TrainedDenoiserParams = Annotated[
    Annotated[TrainedEdmParams, Tag("edm")] | Annotated[VpParams, Tag("vp")] | Annotated[FlowParams, Tag("flow")],
    Discriminator(_kind),
]


def denoiser_params(body: Mapping[str, Any]) -> AnyDenoiserParams:
    """The section from plain values, as model cards hold them. Raises pydantic's ValidationError for other values."""
    return _DENOISER.validate_python(body)
