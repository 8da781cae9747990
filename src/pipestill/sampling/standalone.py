"""The Python files of an exported folder, which let plain Diffusers load it: made of this project's own definitions.

`pipeline.py` holds `PixelPipeline` with all that it samples by, random numbers included; `edm_unet.py` the network of a
converted ADM, which Diffusers does not have. Parameters become dataclasses there. Reads the project's sources.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from pipestill import __version__
from pipestill.bundle import Substitute, bundle
from pipestill.config.denoisers import EdmParams, FlowParams, VpParams
from pipestill.config.fields import Section
from pipestill.config.runs import ChurnParams, RunParams

PIPELINE, NETWORK = "pipeline", "edm_unet"  # modules, as model_index.json names them
HEAD = '''\
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""{says}

Written by `pipestill export`, version {version}, from the sources of pipestill, whose modules are named below.
"""
'''
PARAMETERS = {("pipestill.config.denoisers", kind.__name__): kind for kind in (EdmParams, VpParams, FlowParams)} | {
    ("pipestill.config.runs", kind.__name__): kind for kind in (ChurnParams, RunParams)
}
DENOISER_PARAMS = '''\
def denoiser_params(body: Mapping[str, Any]) -> AnyDenoiserParams:
    """The section from plain values, as model cards hold them."""
    kinds: dict[str, Any] = {"edm": EdmParams, "vp": VpParams, "flow": FlowParams}
    section: AnyDenoiserParams = kinds[body.get("kind", "edm")](**body)
    return section
'''
CHECK_SECTION = '''\
def check_section(section: type[Any], body: Mapping[str, Any], where: str) -> Any:
    """The section from plain values. Raises InputError for a value that it cannot have."""
    try:
        return section(**body)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from None
'''
COMPARISONS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}  # as the marks of a field's range call them


@cache
def pipeline_source() -> str:
    """The text of `pipeline.py`."""
    substitutes = {place: Substitute(_dataclass(kind)) for place, kind in PARAMETERS.items()}
    substitutes["pipestill.config.denoisers", "denoiser_params"] = Substitute(DENOISER_PARAMS)
    substitutes["pipestill.config.reading", "check_section"] = Substitute(CHECK_SECTION)
    return bundle(
        [("pipestill.sampling.pipeline", "PixelPipeline")],
        head=HEAD.format(says="A Diffusers pipeline for class-conditional images in few steps.", version=__version__),
        substitutes=substitutes,
        external={("pipestill.networks.unet2d", "UNet2DModel"): "from diffusers import UNet2DModel"},
        without={"PixelPipeline": {"from_pretrained", "save_pretrained"}},
    )


@cache
def network_source() -> str:
    """The text of `edm_unet.py`."""
    return bundle(
        [("pipestill.networks.unet", "EdmUNet2DModel")],
        head=HEAD.format(says="EDM's ADM network as a Diffusers model.", version=__version__),
        substitutes={},
        external={("pipestill.networks.unet2d", "UNet2DModel"): "from diffusers import UNet2DModel"},
        without={},
    )


def _dataclass(kind: type[Section]) -> str:
    """A section of parameters as a dataclass: the same fields, defaults, choices and checks across fields."""
    lines = ["@dataclass(frozen=True, kw_only=True)", f"class {kind.__name__}:"]
    if kind.__doc__:
        lines.append(f'    """{kind.__doc__}"""\n')
    choices, limits = {}, []
    for name, about in kind.model_fields.items():
        default = "" if about.is_required() else f" = {about.get_default(call_default_factory=True)!r}"
        lines.append(f"    {name}: Any{default}")
        found = _choices(about.annotation)
        if found:
            choices[name] = found
        limits += [(name, limit) for limit in _limits(about)]
    checks = [f"        self.{name}()" for name in kind.__pydantic_decorators__.model_validators]
    lines += ["\n    def __post_init__(self) -> None:"] if checks or choices or limits else []
    for name, found in choices.items():
        lines += [f"        if self.{name} not in {found!r}:"]
        lines += [f'            raise ValueError(f"{name}={{self.{name}}}: one of {", ".join(map(str, found))}")']
    for name, limit in limits:
        lines += [f"        if self.{name} is not None and not self.{name} {limit}:"]
        lines += [f'            raise ValueError(f"{name}={{self.{name}}}: a number {limit} was expected")']
    return "\n".join([*lines, *checks, *_methods(kind)]) + "\n"


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values that a field may have, if they are listed."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return ()


def _limits(field: FieldInfo) -> list[str]:
    """What a field's number is compared with: `>= 1`."""
    parts = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else ()
    within = [about for part in parts for about in getattr(part, "__metadata__", ())]
    marks = [mark for about in (field, *within) for mark in getattr(about, "metadata", ())]
    found = [(sign, getattr(mark, name, None)) for mark in marks for name, sign in COMPARISONS.items()]
    return [f"{sign} {value!r}" for sign, value in found if value is not None]


def _methods(kind: type[Section]) -> list[str]:
    """The checks across fields, without the marks that make them pydantic's."""
    found = []
    for name in kind.__pydantic_decorators__.model_validators:
        text = textwrap.dedent(inspect.getsource(getattr(kind, name)))
        (function,) = ast.parse(text).body
        assert isinstance(function, ast.FunctionDef)
        body = text.splitlines()[function.lineno - 1 :]
        found.append("\n" + textwrap.indent("\n".join(body), "    "))
    return found
