"""The groups of a plain model, where a test has no configuration to derive them from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pie_vllm.vllm.kv_groups import KvGroups


def one_group(specs: Mapping[Any, Any]) -> KvGroups:
    """The groups of a plain model: all layers, of one spec, in one group."""
    spec = next(iter(specs.values()))
    return KvGroups(0, tuple(specs), spec.page_size_bytes, spec.block_size, len(specs))
