"""One self-contained Python file from some of the project's own definitions and all that they use.

Follows names from the definitions asked for through the modules of this package. Only reads source files.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

PACKAGE = "pipestill"
Definition = tuple[str, str]  # a module's dotted name, and a name at its top level


class BundleError(Exception):
    """The definitions cannot be put into one file: a bug in what was asked for, not the user's."""


@dataclass(frozen=True)
class Substitute:
    """Source that stands in for a definition; names in it are those of the definition's module."""

    source: str


@dataclass
class Module:
    """A module's top level: what it defines, and what it imports under which name."""

    name: str
    source: str
    tree: ast.Module = field(init=False)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.source)

    @cached_property
    def definitions(self) -> dict[str, ast.stmt]:
        found: dict[str, ast.stmt] = {}
        for statement in self.tree.body:
            for name in _defined(statement):
                found[name] = statement
        return found

    @cached_property
    def imports(self) -> dict[str, tuple[str, str | None]]:
        """Module and attribute by local name; the attribute is None where the name is a module."""
        found: dict[str, tuple[str, str | None]] = {}
        for statement in _imports(self.tree.body):
            for alias in statement.names:
                if isinstance(statement, ast.Import):
                    found[alias.asname or alias.name.partition(".")[0]] = (alias.name, None)
                    continue
                module, local = str(statement.module), alias.asname or alias.name
                below = f"{module}.{alias.name}"
                own = module.partition(".")[0] == PACKAGE and _is_module(below)
                found[local] = (below, None) if own else (module, alias.name)
        return found


def _defined(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def _imports(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports of a module, those for type checking included."""
    for statement in body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            yield statement
        elif isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            yield from _imports(statement.body)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # what should hold it is no package
        return False


@cache
def module(name: str) -> Module:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise BundleError(f"there is no module {name}")
    return Module(name, Path(spec.origin).read_text(encoding="utf-8"))


def bundle(
    roots: list[Definition],
    *,
    head: str,
    substitutes: Mapping[Definition, Substitute],
    external: Mapping[Definition, str],
    without: Mapping[str, Set[str]],
) -> str:
    """The file's text: `head`, the imports, and every definition that the `roots` need, in an order that runs.

    `external` maps definitions to import lines that are used instead, `without` names methods of classes to leave out.
    Raises BundleError.
    """
    collector = _Collector(substitutes, external, without)
    for root in roots:
        collector.take(*root)
    names = [name for _, name in collector.taken]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BundleError(f"several modules define {', '.join(twice)}: give them different names")
    parts = [head.rstrip() + "\n", "from __future__ import annotations\n", *collector.import_lines()]
    for place in collector.order():
        own = sorted((name for other, name in collector.taken if other == place), key=collector.line_of(place))
        texts = dict.fromkeys(collector.taken[(place, name)] for name in own)
        parts += [f"\n# --- {place} {'-' * (111 - len(place))}\n\n" + "\n\n".join(texts)]
    text = "\n".join(parts)
    if missing := unbound(text):
        raise BundleError(f"nothing defines {', '.join(sorted(missing))}")
    return text


class _Collector:
    def __init__(
        self,
        substitutes: Mapping[Definition, Substitute],
        external: Mapping[Definition, str],
        without: Mapping[str, Set[str]],
    ) -> None:
        self._substitutes, self._external, self._without = substitutes, external, without
        self.taken: dict[Definition, str] = {}
        self.imports: set[str] = set()
        self._needs: dict[str, dict[str, None]] = {}  # modules by the modules that use them

    def import_lines(self) -> list[str]:
        """A line for each module that is not of this package."""
        parts = [line.removeprefix("from ").partition(" import ") for line in self.imports if line.startswith("from ")]
        names: dict[str, list[str]] = {}
        for place, _, name in sorted(parts):
            names.setdefault(place, []).append(name)
        plain = sorted(line for line in self.imports if line.startswith("import "))
        return ["\n".join([*plain, *(f"from {place} import {', '.join(own)}" for place, own in names.items())]) + "\n"]

    def order(self) -> list[str]:
        """The modules, those that others need first."""
        placed: dict[str, None] = {}

        def place(name: str) -> None:
            for other in self._needs.get(name, {}):
                place(other)
            placed.setdefault(name)

        for name, _ in self.taken:
            place(name)
        return [name for name in placed if any(name == other for other, _ in self.taken)]

    def line_of(self, place: str) -> Callable[[str], int]:
        return lambda name: module(place).definitions[name].lineno if name in module(place).definitions else 0

    def take(self, place: str, name: str) -> None:
        """Takes a definition and all that it uses."""
        key = (place, name)
        if key in self._external:
            self.imports.add(self._external[key])
            return
        if key in self.taken:
            return
        own = module(place)
        if name not in own.definitions:
            if name not in own.imports:
                raise BundleError(f"{place} has no {name}")
            self._take_import(own, name)
            return
        if key in self._substitutes:
            text = self._substitutes[key].source
            statements: list[ast.AST] = list(ast.parse(text).body)
        else:
            statement = own.definitions[name]
            dropped = [node for node in getattr(statement, "body", []) if _is_left_out(node, self._without.get(name))]
            text = _text(own, statement, dropped)
            statements = [node for node in ast.iter_child_nodes(statement) if node not in dropped]
        for other in (name for made in ast.parse(text).body for name in _defined(made)):
            self.taken[(place, other)] = text
        for node in statements:
            self._follow(own, node)

    def _follow(self, own: Module, node: ast.AST) -> None:
        for found in ast.walk(node):
            if isinstance(found, ast.ImportFrom) and str(found.module).partition(".")[0] == PACKAGE:
                raise BundleError(f"{own.name}:{found.lineno} imports {found.module} within a function")
            if isinstance(found, ast.Attribute) and isinstance(found.value, ast.Name):
                target = own.imports.get(found.value.id)
                if target is not None and _is_own_module(target):
                    self._need(own, target[0])
                    self.take(target[0], found.attr)
            elif isinstance(found, ast.Name) and found.id in own.definitions:
                self.take(own.name, found.id)
            elif isinstance(found, ast.Name) and found.id in own.imports and not _is_own_module(own.imports[found.id]):
                self._take_import(own, found.id)

    def _need(self, own: Module, place: str) -> None:
        self._needs.setdefault(own.name, {}).setdefault(place)

    def _take_import(self, own: Module, local: str) -> None:
        place, attribute = own.imports[local]
        if place.partition(".")[0] == PACKAGE:
            if attribute != local:
                raise BundleError(f"{own.name} imports {place}.{attribute} as {local}: import it under its own name")
            self._need(own, place)
            self.take(place, local)
        elif attribute is None:
            self.imports.add(f"import {place}" if local == place.partition(".")[0] else f"import {place} as {local}")
        else:
            self.imports.add(f"from {place} import {attribute}" + (f" as {local}" if local != attribute else ""))


def _is_own_module(target: tuple[str, str | None]) -> bool:
    return target[1] is None and target[0].partition(".")[0] == PACKAGE


def _is_left_out(node: ast.AST, names: Set[str] | None) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name in (names or ())


def _text(own: Module, statement: ast.stmt, dropped: list[ast.FunctionDef]) -> str:
    """The statement's lines without the dropped methods; `module.name` of this package becomes `name`."""
    lines = own.source.splitlines(keepends=True)
    for node in sorted(ast.walk(statement), key=_end, reverse=True):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
            continue
        target = own.imports.get(node.value.id)
        if target is not None and _is_own_module(target):
            if node.lineno != node.end_lineno:
                raise BundleError(f"{own.name}:{node.lineno}: a name over several lines")
            line = lines[node.lineno - 1].encode()
            start = node.value.col_offset
            lines[node.lineno - 1] = (line[:start] + node.attr.encode() + line[node.end_col_offset :]).decode()
    gone = {line for node in dropped for line in range(_first_line(node), (node.end_lineno or 0) + 1)}
    kept = [
        lines[number - 1]
        for number in range(_first_line(statement), (statement.end_lineno or 0) + 1)
        if number not in gone
    ]
    text = re.sub(r"  # type: ignore\[.*?\]", "", "".join(kept))  # for a checker that does not read the file
    text = re.sub(r"\n{3,}", "\n\n", text)
    return text if text.endswith("\n") else text + "\n"


def _end(node: ast.AST) -> tuple[int, int]:
    return (getattr(node, "end_lineno", 0) or 0, getattr(node, "end_col_offset", 0) or 0)


def _first_line(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def unbound(text: str) -> set[str]:
    """Names that a file uses and neither defines, imports nor finds among Python's own."""
    tree = ast.parse(text)
    bound = set(dir(builtins)) | {"__name__"}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - bound
