"""The page of all parameters, made from `config`: names, values allowed, defaults, and the comment beside each."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from pipestill.config import Params, Section
from pipestill.configure import conf_folder
from pipestill.explain import SHARED, kinds

LIMITS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}  # as pydantic's constraints call them
HEAD = """\
# Parameters

Made from `src/pipestill/config/` by `pipestill config --docs > docs/parameters.md`.

`params.yaml` holds every value; `pipestill config` writes it from `conf/`. `NAME` stands for the name of an entry
(`[a-z0-9][a-z0-9-]*`). A stage takes further values on its command line as `key.name=value`.

Where parameters are composed (`pipestill config`, or a stage with no params.yaml beside it), some settings are shared:

{shared}

`like: OTHER` in an entry takes over what the entry OTHER states, and `experiment=` chooses a whole setting:

{experiments}
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD.format(shared=_shared(), experiments=_experiments())]
    for key, section in _sections("", Params):
        title = f"`{key}`" if key else "Sections of params.yaml"
        about = " ".join(str(section.__dict__.get("__doc__") or "").split())
        rows = [_row(section, name, field) for name, field in section.model_fields.items()]
        table = ["| name | values | default | meaning |", "| --- | --- | --- | --- |", *rows]
        parts.append("\n".join([f"## {title}", "", *([about, ""] if about else []), *table, ""]))
    return "\n".join(parts)


def _shared() -> str:
    rows = [f"| `{key}.*` | `{place}.*` |" for key, place in SHARED.items()]
    return "\n".join(
        ["| shared setting | stands in params.yaml, unless an entry says otherwise, as |", "| --- | --- |", *rows]
    )


def _experiments() -> str:
    """The experiments in conf/, each with its file's comment."""
    said = []
    for file in sorted((conf_folder() / "experiment").glob("*.yaml")):
        comment = [
            line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if re.match("#(?! @)", line)
        ]
        said.append(f"- `{file.stem}`: {' '.join(comment).rstrip('.')}.")
    return "\n".join(said)


def _sections(key: str, section: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    yield key, section
    for name, field in section.model_fields.items():
        place = f"{key}.{name}".lstrip(".") + _entry(field.annotation)
        below = _section_in(field.annotation)
        for kind, choice in kinds(field.annotation).items():
            yield f"{place} (kind: {kind})", choice
        if below is not None and not kinds(field.annotation):
            yield from _sections(place, below)


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for found in map(_section_in, get_args(annotation)) if found is not None), None)


def _entry(annotation: Any) -> str:
    if get_origin(annotation) is dict:
        return ".NAME"
    return "[]" if get_origin(annotation) is tuple else ""


def _row(section: type[Section], name: str, field: FieldInfo) -> str:
    if _section_in(field.annotation) is not None:
        values = "entries by name" if get_origin(field.annotation) is dict else "section"
        default = ""
    else:
        values = _values(field.annotation, field.metadata)
        default = "required" if field.is_required() else _show(field.default)
    return f"| `{name}` | {values} | {default} | {_comment(section, name)} |"


def _show(value: Any) -> str:
    """A default as it would stand in params.yaml."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n")
    return f"`{text.strip()}`"


def _values(annotation: Any, metadata: list[Any]) -> str:
    """The values that a field takes, in words."""
    arguments = get_args(annotation)
    if get_origin(annotation) is tuple:
        return "list of " + _values(arguments[0], [])
    if get_origin(annotation) is dict:
        return f"{_values(arguments[0], [])}: {_values(arguments[1], [])}"
    if hasattr(annotation, "__metadata__"):
        return _values(arguments[0], list(annotation.__metadata__))
    if get_origin(annotation) in (UnionType, Union):
        return " or ".join(_values(argument, metadata) for argument in arguments)
    if arguments and all(isinstance(argument, str | int) for argument in arguments):
        return ", ".join(f"`{argument}`" for argument in arguments)
    word = {int: "integer", float: "number", bool: "`true`, `false`", str: "text", type(None): "`null`"}
    return " ".join([word.get(annotation, str(annotation)), *_limits(metadata)])


def _limits(metadata: list[Any]) -> Iterator[str]:
    for item in metadata:
        yield from _limits(list(getattr(item, "metadata", [])))
        for name, sign in LIMITS.items():
            if (limit := getattr(item, name, None)) is not None:
                yield f"{sign} {limit:.10g}"


def _comment(section: type[Section], name: str) -> str:
    """The comment beside a field in the source of the section that states it."""
    stated = next(kind for kind in section.__mro__ if name in inspect.get_annotations(kind))
    found = re.search(rf"^    {name}: [^#\n]*#\s*(.+)$", inspect.getsource(stated), re.MULTILINE)
    return found[1].replace("|", "\\|") if found else ""
