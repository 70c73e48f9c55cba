"""The entries of blocks in the prefix cache, which is vLLM's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pie_vllm.errors import IntegrityError


def _refuse(block: Any, key: Any, index: int) -> None:
    raise IntegrityError(f"block {block.block_id} cannot get the entry of {key!r} at {index}")


class PrefixEntries(NamedTuple):
    """How the policy changes them.

    Attributes:
        move: makes the entry of the first block point to the second, which has none.
        drop: removes the entry of a block, if it has one.
        put: gives a block without an entry that of a key, as the block at this index of a
            request; needed where anything is parked.
    """

    move: Callable[[Any, Any], None]
    drop: Callable[[Any], None]
    put: Callable[[Any, Any, int], None] = _refuse
