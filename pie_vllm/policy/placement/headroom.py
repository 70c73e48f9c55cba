"""How many residents a step is to find free: those made free ahead, and those left unpromoted."""

from __future__ import annotations

AHEAD_STEPS = 4
"""Number of steps for whose new blocks residents are made free at once: demoting one block in each
of many allocations costs several times as much."""

AHEAD_MIN = 8
"""Number of new blocks a step below which none is demoted ahead: it would be loaded for some steps
more, and there is little to save."""

AHEAD_MAX = 64
"""Maximum number of blocks demoted at once where fewer are asked for; each takes microseconds."""


def demoted_at_once(running: int, block_size: int) -> int:
    """Number of blocks demoted where one is asked for, while ``running`` requests decode."""
    if running < AHEAD_MIN * block_size:
        return 1
    return min(AHEAD_STEPS * running // block_size, AHEAD_MAX)


def tail_room(tokens: int, block_size: int) -> int:
    """Number of free residents, about, that promotion leaves to a step that decodes so much.

    Args:
        tokens: Number of tokens of a step of the running requests.
        block_size: Tokens of a block.
    """
    return tokens // block_size + 2
