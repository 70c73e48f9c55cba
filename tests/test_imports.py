"""Policy stays pure: no torch, no vLLM, no clock."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

POLICY = Path(__file__).resolve().parents[1] / "pie_vllm" / "policy"
FORBIDDEN = {"torch", "vllm", "time", "datetime", "numpy", "ctypes", "random"}


def test_policy_imports_neither_torch_nor_vllm_nor_a_clock() -> None:
    """Policy decides; it owns no bytes and injects no time or chance of its own."""
    for path in POLICY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] not in FORBIDDEN, f"{path.name} imports {name}"
                assert not name.startswith("pie_vllm.vllm"), f"{path.name} imports {name}"


def test_importing_the_package_imports_no_torch_and_no_vllm() -> None:
    """`import pie_vllm` is cheap and works beside any vLLM."""
    code = "import sys, pie_vllm; print('torch' in sys.modules, 'vllm' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


def test_only_the_seam_imports_vllm() -> None:
    """One folder knows vLLM."""
    package = POLICY.parent
    for path in package.rglob("*.py"):
        if path.is_relative_to(package / "vllm"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(n.split(".")[0] == "vllm" for n in names), path
