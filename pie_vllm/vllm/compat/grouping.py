"""vLLM's grouping of layers, which the workers need before vLLM groups them.

Read in vLLM 0.32.0 and 0.33.0. Each has modules that the other lacks, so they are imported by
name; tests/helpers/drift_names.py has what is called of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

PLANNING = "vllm.v1.core.kv_cache_planning"


def groups_by_vllm(vllm_config: Any, specs: Mapping[str, Any]) -> list[Any]:
    """The groups that vLLM will make of a worker's layers.

    It is ``get_kv_cache_groups``, v1/core/kv_cache_utils.py:2159 in 0.32. In 0.33 the planning of
    the cache is a module of its own, where a platform's builder may group otherwise
    (``get_kv_cache_groups_from_builder``, v1/core/kv_cache_planning.py:1203).

    Args:
        vllm_config: the finished configuration.
        specs: KV cache specs by layer.

    Returns:
        vLLM's KVCacheGroupSpecs.
    """
    found: list[Any]
    if find_spec(PLANNING) is None:
        utils = import_module("vllm.v1.core.kv_cache_utils")
        found = utils.get_kv_cache_groups(vllm_config, dict(specs))
        return found
    builders = import_module("vllm.v1.core.kv_cache_config_builder")
    builder = builders.get_kv_cache_config_builder(vllm_config)
    planning = import_module(PLANNING)
    found = planning.get_kv_cache_groups_from_builder(builder, vllm_config, dict(specs))
    return found
