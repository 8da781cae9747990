"""What all sections of parameters are made of: a frozen base, and types with their ranges."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
)


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    for place, value in enumerate(values):
        if value in values[:place]:
            stated = value.plain() if isinstance(value, Section) else value
            raise ValueError(f"{stated} is there twice, which would count it twice")
    return values


def _no_home(path: str) -> str:
    if path.startswith("~"):
        if path == "~":
            raise ValueError("~ alone is not expanded: write ~/ or the whole path")
        raise ValueError(f"{path}: ~ is only expanded on a command line, write the whole path")
    return path


def _background(text: str) -> str:
    if not re.fullmatch(r"refuse|white|black|#[0-9a-fA-F]{6}", text):
        raise ValueError(f"'{text}' is not refuse, white, black, or a colour such as '#ff8000' (quoted in YAML)")
    return text


Once = AfterValidator(_each_once)  # of a list whose repeats would make no sense
PathText = Annotated[str, Field(min_length=1), AfterValidator(_no_home)]  # relative to the project
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]*$")]
Background = Annotated[str, AfterValidator(_background)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Sigma = Annotated[float, Field(gt=0, le=1e6)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Beta = Annotated[float, Field(ge=0, lt=1)]

ExtractorName = Literal["classifier", "efficientnet_lite0", "inception"]
SamplerName = Literal["native", "euler", "heun", "heun-churn", "2m", "renoise", "ddpm", "ddim-linear-alpha"]
Precision = Literal["fp32", "bf16"]
MixName = Literal["balanced", "data"]  # classes equally often, or as often as in the train part


def _class_choice(given: Any) -> Any:
    """YAML reads an unquoted `no`, `1.5` or `null` as something that is neither a name nor a number."""
    number = isinstance(given, int) and not isinstance(given, bool) and given >= 0
    if not number and not (isinstance(given, str) and given):
        raise ValueError("a class is given by its name or by its number from 0; quote names such as 'no' and '1.5'")
    return given


ClassChoice = Annotated[int | str, BeforeValidator(_class_choice)]


class Section(BaseModel):
    """A frozen group of parameters; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`layers: true` would count as 1."""
        annotation = str(cls.model_fields[str(info.field_name)].annotation)
        many = isinstance(value, list | tuple)
        each = value if many else [value]
        if isinstance(value, Mapping) and annotation.startswith("dict["):  # by name, and no section of its own
            each = value.values()
        if "bool" not in annotation and any(isinstance(one, bool) for one in each):
            raise ValueError(f"{'a list with' if many else ''} true or false is not expected here".strip())
        return value

    def plain(self) -> dict[str, Any]:
        """The section as plain JSON values, the form that manifests and keys hold."""
        return self.model_dump(mode="json")


def range_of_karras(spacing: str, sigma_min: float | None, sigma_max: float | None) -> None:
    """A range belongs to Karras's noise levels, and to them alone."""
    if spacing != "karras":
        if sigma_min is not None or sigma_max is not None:
            raise ValueError(f"spacing={spacing} takes the denoiser's own steps: set sigma_max and sigma_min to null")
    elif sigma_min is None or sigma_max is None:
        raise ValueError("spacing=karras needs sigma_max and sigma_min")
    else:
        ordered(sigma_min, sigma_max)


def ordered(sigma_min: float, sigma_max: float) -> None:
    if sigma_min > sigma_max:
        raise ValueError(f"sigma_min={sigma_min} lies above sigma_max={sigma_max}")
