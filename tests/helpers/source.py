"""The source of ``pie_vllm`` as syntax trees: what it imports, defines and names."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pie_vllm"


@cache
def modules(folder: Path = PACKAGE) -> dict[str, ast.Module]:
    """Tree of each module below a folder of the repository, by its dotted name."""
    trees = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text())
    return trees


def imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names that a module imports, wherever it does: ``from a import b`` is ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph() -> dict[str, set[str]]:
    """Modules of ``pie_vllm`` that each of them imports, those for type checkers included."""
    graph: dict[str, set[str]] = {}
    known = modules()
    for name, tree in known.items():
        # ``from a import b`` names a module or something in one.
        found = {full if full in known else full.rpartition(".")[0] for full in imports(tree)}
        graph[name] = found & known.keys()
    return graph


class Definition(NamedTuple):
    """A function, class, constant or public method.

    Attributes:
        name: Its own name.
        place: Module, and class of a method.
        node: Its syntax tree.
    """

    name: str
    place: str
    node: ast.stmt


def definitions(module: str, tree: ast.Module) -> Iterator[Definition]:
    """What a module offers to others: not private, but for functions and classes of a module."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield Definition(node.name, module, node)
        for name in _constants(node):
            yield Definition(name, module, node)
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield Definition(inner.name, f"{module}.{node.name}", inner)


def _constants(node: ast.stmt) -> Iterator[str]:
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    for target in targets:
        if isinstance(target, ast.Name) and target.id.isupper():
            yield target.id


@cache
def names(tree: ast.AST) -> Counter[str]:
    """How often a tree refers to each name: as itself, as an attribute, in a dotted string."""
    found: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found[node.id] += 1
        elif isinstance(node, ast.Attribute):
            found[node.attr] += 1
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.update(_parts(node.value))
    return found


def _parts(text: str) -> list[str]:
    """Names in a string such as ``"package.module:Name"``; none in prose."""
    parts = text.replace(":", ".").split(".")
    return parts if all(part.isidentifier() for part in parts) else []
