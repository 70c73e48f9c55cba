"""All that pie uses of vLLM, looked up in the vLLM that a process imports.

``python -m tests.helpers.drift`` prints what it found as one JSON object; tests/vllm/test_drift.py
runs it on each release and compares.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.helpers.drift_names import ATTRIBUTES, SIGNATURES
from tests.helpers.model import REPOSITORY

SEAM = REPOSITORY / "pie_vllm" / "vllm"
EXPECTATIONS = ("expect", "expect_in_order")
"""Functions of ``patching`` that check a line of vLLM."""


def find(name: str) -> Any:
    """What ``module:Class.method`` names. Raises AttributeError or ImportError."""
    module, _, path = name.partition(":")
    found: Any = import_module(module)
    for part in path.split(".") if path else ():
        found = getattr(found, part)
    return found


def imported() -> Iterator[str]:
    """Every name that pie imports from vLLM, as ``find`` takes it."""
    for path in sorted(SEAM.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "vllm":
                yield from (f"{node.module}:{alias.name}" for alias in node.names)


def resolve(name: str) -> bool:
    """Whether an imported name is there, be it a module."""
    module, _, last = name.partition(":")
    try:
        find(name)
    except AttributeError:
        try:
            import_module(f"{module}.{last}")
        except ImportError:
            return False
    except ImportError:
        return False
    return True


def signature(name: str) -> str:
    """The parameters of a function, with defaults and without annotations."""
    try:
        function = find(name)
    except (AttributeError, ImportError):
        return "missing"
    empty = inspect.Parameter.empty
    found = inspect.signature(inspect.unwrap(function))
    parameters = [p.replace(annotation=empty) for p in found.parameters.values()]
    text = str(found.replace(parameters=parameters, return_annotation=empty))
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def has_attribute(name: str, attribute: str) -> bool:
    """Whether a class has an attribute, or its methods set it on its objects."""
    try:
        owner = find(name)
    except (AttributeError, ImportError):
        return False
    if hasattr(owner, attribute) or attribute in getattr(owner, "__dataclass_fields__", ()):
        return True
    return any(attribute in _set_in(base) for base in owner.__mro__ if base is not object)


def _set_in(owner: type) -> set[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    except (OSError, TypeError):
        return set()
    found = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    body: list[Any] = tree.body[0].body  # type: ignore[attr-defined]
    declared = (n.target for n in body if isinstance(n, ast.AnnAssign))
    return found | {n.id for n in declared if isinstance(n, ast.Name)}


def expected() -> list[str]:
    """The functions of pie that check a line of vLLM, as ``file:function``."""
    sites = set()
    for path in sorted(SEAM.rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef) or function.name in EXPECTATIONS:
                continue
            for node in ast.walk(function):
                called = node.func if isinstance(node, ast.Call) else None
                name = getattr(called, "attr", getattr(called, "id", None))
                if name in EXPECTATIONS:
                    sites.add(f"{path.name}:{function.name}")
    return sorted(sites)


class Checks:
    """Runs what checks vLLM's lines, and notes where it came from and what failed."""

    def __init__(self) -> None:
        self.ran: set[str] = set()
        self.failed: list[str] = []

    def record(self, modules: list[Any]) -> None:
        """Note each check of a line from now on."""
        for module in modules:
            for name in EXPECTATIONS:
                if hasattr(module, name):
                    setattr(module, name, self._recorded(getattr(module, name)))

    def _recorded(self, original: Any) -> Any:
        def check(obj: Any, *fragments: str) -> None:
            code = sys._getframe(1).f_code
            self.ran.add(f"{Path(code.co_filename).name}:{code.co_name}")
            original(obj, *fragments)

        return check

    def run(self, function: Any, *arguments: Any) -> Any:
        """Call what may find that a line is gone."""
        try:
            found = function(*arguments)
            if hasattr(found, "__enter__"):
                with found:
                    pass
        except Exception as error:
            self.failed.append(f"{type(error).__name__}: {error}")
            return None
        return found


def _nothing(*_: Any, **__: Any) -> None:
    """In place of what pie would call."""


def runners() -> Iterator[Any]:
    """Objects of all classes of model runners, with what pie reads of them and nothing else."""
    from vllm.v1.worker.cpu.model_runner import CPUModelRunner as CPUModelRunnerV2
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for kind in (GPUModelRunner, CPUModelRunner):
        runner = object.__new__(kind)
        runner.model = None
        yield runner
    for kind in (GPUModelRunnerV2, CPUModelRunnerV2):
        runner = object.__new__(kind)
        runner.req_states = None
        runner.cudagraph_manager = SimpleNamespace(graphs={})
        yield runner


def check_lines() -> Checks:
    """Run all checks of vLLM's lines, on the classes of both kinds of runners."""
    compat = sorted((SEAM / "compat").glob("[a-z]*.py"))
    modules = [import_module(f"pie_vllm.vllm.compat.{path.stem}") for path in compat]
    checks = Checks()
    checks.record(modules)
    for module in modules:
        for name, function in vars(module).items():
            if name.startswith("check_") and function.__module__ == module.__name__:
                checks.run(function)
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
    from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator
    from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
        SpeculatorCudaGraphManager,
    )

    from pie_vllm.vllm.compat import cuda_graphs, engine_core, model_runner

    checks.run(engine_core.own_block_pool, object)
    checks.run(engine_core.own_block_manager, _nothing)
    checks.run(engine_core.adopt_without_caching, SimpleNamespace(), SimpleNamespace())
    checks.run(engine_core.check_computed_elsewhere)
    checks.run(cuda_graphs.breakable_graphs)
    checks.run(cuda_graphs._veto_v1, object.__new__(CudagraphDispatcher), _nothing)
    checks.run(cuda_graphs._veto_v2, object.__new__(ModelCudaGraphManager), _nothing)
    speculator = object.__new__(EagleSpeculator)
    speculator.prefill_cudagraph_manager = object.__new__(SpeculatorCudaGraphManager)
    checks.run(cuda_graphs._first_draft_pass, SimpleNamespace(speculator=speculator))
    for runner in runners():
        checks.run(model_runner.of(runner).forward_pass, runner)
        checks.run(model_runner.own_allocation, runner, _nothing)
        checks.run(cuda_graphs.full_graphs, runner)
        checks.run(model_runner.before_inputs, runner, _nothing)
    return checks


def main() -> None:
    """Print what this process's vLLM has."""
    import vllm

    checks = check_lines()
    names = sorted(set(imported()))
    result = {
        "version": vllm.__version__,
        "imported": len(names),
        "missing": [name for name in names if not resolve(name)],
        "signatures": {name: signature(name) for name in SIGNATURES},
        "no_attribute": [
            f"{owner}.{attribute}"
            for owner, attributes in ATTRIBUTES.items()
            for attribute in attributes.split()
            if not has_attribute(owner, attribute)
        ],
        "not_run": sorted(set(expected()) - checks.ran),
        "failed": checks.failed,
    }
    print("FOUND", json.dumps(result))


if __name__ == "__main__":
    main()
