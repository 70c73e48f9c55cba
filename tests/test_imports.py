"""Who imports whom: the layers of the package, and no circle among them."""

from __future__ import annotations

import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.helpers.source import import_graph, imports, modules

IMPURE = {"torch", "vllm", "time", "datetime", "ctypes", "random"}


def inside(name: str, *packages: str) -> bool:
    """Whether a module lies in one of these packages of ``pie_vllm``."""
    return any(f"{name}.".startswith(f"pie_vllm.{package}.") for package in packages)


def below(*packages: str) -> list[tuple[str, str]]:
    """Each import of a module in one of these packages: the module and what it imports."""
    found = [(m, i) for m, tree in modules().items() if inside(m, *packages) for i in imports(tree)]
    assert found, f"no module in {packages}"
    return found


def test_policy_imports_neither_torch_nor_vllm_nor_a_clock() -> None:
    """Policy decides; it owns no bytes and injects no time or chance of its own."""
    for module, imported in below("policy"):
        assert imported.split(".")[0] not in IMPURE, f"{module} imports {imported}"


def test_importing_the_package_imports_no_torch_and_no_vllm() -> None:
    """`import pie_vllm` is cheap and works beside any vLLM."""
    code = "import sys, pie_vllm; print('torch' in sys.modules, 'vllm' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


def test_only_the_seam_imports_vllm() -> None:
    """One folder knows vLLM."""
    for module, tree in modules().items():
        if not inside(module, "vllm"):
            for imported in imports(tree):
                assert imported.split(".")[0] != "vllm", f"{module} imports {imported}"


@pytest.mark.parametrize(
    ("importers", "forbidden"),
    [
        (("policy", "engine", "simulation"), "vllm"),
        (("policy", "simulation"), "engine"),
        (("engine",), "policy"),
        (("policy", "engine", "vllm"), "simulation"),
    ],
)
def test_layers_import_downwards_only(importers: tuple[str, ...], forbidden: str) -> None:
    """Policy and engine know neither each other nor the seam; the product knows no simulation."""
    for module, imported in below(*importers):
        assert not inside(imported, forbidden), f"{module} imports {imported}"


def test_no_module_imports_itself_through_others() -> None:
    """Not even for a type checker: a circle has no order to read it in."""
    graph = import_graph()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import circle: " + " -> ".join(reversed(error.args[1])))
