"""Pie for vLLM: pools CPU memory into the KV cache.

``vllm serve MODEL --block-manager pie`` or
``LLM(model, **pie_vllm.engine_args(pool_gib=4))``. Importing this package
imports neither torch nor vllm.
"""

from pie_vllm.config import PieConfig, engine_args
from pie_vllm.errors import (
    ConfigError,
    GateError,
    IntegrityError,
    NativeLibraryError,
    PieError,
    TransferError,
    UnsupportedError,
)

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "GateError",
    "IntegrityError",
    "NativeLibraryError",
    "PieConfig",
    "PieError",
    "TransferError",
    "UnsupportedError",
    "__version__",
    "engine_args",
]
