"""YAML as parameter files and overrides use it: what readers of YAML 1.1 and 1.2 understand alike, and nothing else.

DVC reads params.yaml as YAML 1.2, Snakemake as YAML 1.1. A plain value that the two read differently is refused here,
as is a key that is there twice, so that all three see the same parameters.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pipestill.errors import InputError

FLOAT = re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)$")
AMBIGUOUS = {  # plain values that YAML 1.1 and 1.2 read differently, and what to write instead
    re.compile(r"[-+]?0[0-9_]+"): "a number has no leading zeros",
    re.compile(r"[-+]?0(o[0-7_]+|b[01_]+)|[-+]?0x[0-9a-fA-F]*_[0-9a-fA-F_]*"): "write a decimal number",
    re.compile(r"[-+]?[0-9.]*[0-9]_[0-9_.]*(?:[eE][-+]?[0-9]+)?"): "a number has no underscores",
    re.compile(r"[-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?"): "YAML 1.1 reads it as a number to base 60",
    re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ].*)?"): "YAML reads it as a date",
    re.compile(r"yes|no|on|off", re.IGNORECASE): "write true or false",
}
SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float")}


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML 1.2's floats: 1e-4 is a number (PyYAML alone reads it as text). In C where PyYAML was built so."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is there twice", key.start_mark)
                seen.add(key.value)
        return dict(super().construct_mapping(node, deep=deep))

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and not node.style and (why := ambiguous(node.value)):
            text = f"{node.value} is ambiguous ({why}): if it is text, quote it"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
        return super().construct_object(node, deep=deep)


class Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes every text that would be read as something else."""

    def represent_str(self, data: str) -> yaml.Node:
        plain = not ambiguous(data) and not FLOAT.match(data)
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if plain else "'")


Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))
Dumper.add_representer(str, Dumper.represent_str)


def ambiguous(text: str) -> str | None:
    """Why two readers of YAML would not agree on a plain value; None where they do."""
    return next((why for pattern, why in AMBIGUOUS.items() if pattern.fullmatch(text)), None)


def parse_yaml(text: str, where: str = "") -> Any:
    """The plain values of a YAML text. Raises InputError that names the line, and the file where one is given."""
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join((error.problem or error.context or "it cannot be read").split())
        if mark and mark.line < text.count("\n") + 1 and text.split("\n")[mark.line].lstrip(" ").startswith("\t"):
            problem = "a tab where YAML wants spaces"
        place = [where] * bool(where) + [f"line {mark.line + 1}"] * (mark is not None and "\n" in text)
        raise InputError(": ".join([", ".join(place)] * bool(place) + [problem])) from error
    except (yaml.YAMLError, ValueError) as error:
        problem = f"not readable as YAML ({' '.join(str(error).split())})"
        raise InputError(f"{where}: {problem}" if where else problem) from error


def parse_value(text: str) -> Any:
    """The value of an override as it was typed: a list, mapping or quoted text in YAML, else a number, true, false or
    null, else text as it stands, whatever characters it has. Raises InputError."""
    if text[:1] in ("[", "{", '"', "'"):
        return _expanded(parse_yaml(text))
    if why := ambiguous(text):
        raise InputError(f"{text} is ambiguous ({why})")
    loader = Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False)) if text else ""
        found = loader.construct_object(yaml.ScalarNode(tag, text)) if tag in SCALARS else text
    finally:
        loader.dispose()
    return _expanded(found)


def _expanded(value: Any) -> Any:
    """`~/` at the beginning of a text is the user's folder, which a shell would not put there after a `=`."""
    if isinstance(value, str) and re.match(r"~[^/]*/", value):
        try:
            return str(Path(value).expanduser())
        except RuntimeError:  # nobody of that name, or no home folder
            return value
    if isinstance(value, list):
        return [_expanded(each) for each in value]
    if isinstance(value, dict):
        return {key: _expanded(each) for key, each in value.items()}
    return value


def dump_yaml(body: Any, **form: Any) -> str:
    """Plain values as YAML that `parse_yaml`, DVC and Snakemake read alike."""
    return str(yaml.dump(body, Dumper=Dumper, sort_keys=False, allow_unicode=True, **form))
