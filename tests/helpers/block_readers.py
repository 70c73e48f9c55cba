"""Which functions of vLLM read how many blocks are free, used, reserved or kept back."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

NAMES = (
    "num_free_blocks",
    "get_num_free_blocks",
    "get_usage",
    "get_kv_cache_usage",
    "watermark_blocks",
    "transition_watermark",
    "reserved_blocks",
    "_inflight_prefill_reserved_blocks",
    "scheduler_reserve_full_isl",
    "full_sequence_must_fit",
    "pop_blocks_for_free",
)
"""And ``usage`` of a KV cache manager."""


class Reader(NamedTuple):
    """A name that a function of a file reads, passes on or defines."""

    file: str
    function: str
    name: str


def readers(root: Path) -> dict[Reader, list[int]]:
    """All readers in the Python files of a ``vllm`` folder, with their lines."""
    found: dict[Reader, list[int]] = {}
    for path in sorted(root.rglob("*.py")):
        text = path.read_text()
        if not any(name in text for name in (*NAMES, "kv_cache_manager.usage")):
            continue
        file = path.relative_to(root).as_posix()
        for function, name, line in _names(ast.parse(text), ""):
            lines = found.setdefault(Reader(file, function, name), [])
            if line not in lines:
                lines.append(line)
    return found


def _names(node: ast.AST, scope: str) -> Iterator[tuple[str, str, int]]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        scope = f"{scope}.{node.name}" if scope else node.name
    name = _name(node)
    if name is not None:
        yield scope, name, node.lineno  # type: ignore[attr-defined]  # each of these has one
    for child in ast.iter_child_nodes(node):
        yield from _names(child, scope)


def _name(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute):
        owner = node.value
        if node.attr == "usage" and isinstance(owner, ast.Attribute):
            return "usage" if owner.attr == "kv_cache_manager" else None
        name = node.attr
    elif isinstance(node, ast.Name):
        name = node.id
    elif isinstance(node, ast.FunctionDef):
        name = node.name
    else:
        return None
    return name if name in NAMES else None
