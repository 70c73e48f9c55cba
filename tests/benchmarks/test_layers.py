"""Who may import whom in `benchmarks`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

FORBIDDEN = {
    ".": ("tests",),
    "harness": ("benchmarks.real", "benchmarks.simulated", "benchmarks.gpu"),
    "simulated": ("benchmarks.real", "benchmarks.gpu", "vllm", "torch", "pie_vllm.vllm"),
}
"""Folder: packages that nothing in it imports, lazily or not."""


def imports(path: Path) -> Iterator[str]:
    """Names of the modules that a file imports; `from a import b` counts as `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_nothing_imports_what_is_above_it(folder: str) -> None:
    """Benchmarks stand without the tests; what is shared stands without what shares it."""
    files = list((BENCHMARKS / folder).rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            for package in FORBIDDEN[folder]:
                assert not f"{name}.".startswith(f"{package}."), f"{path} imports {name}"
