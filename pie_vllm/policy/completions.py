"""Which requests may complete a block in a step, without asking all of them."""

from __future__ import annotations


class Completions:
    """Requests by the first step in which their last block can be full.

    A request computes one token a step or is left out, unless it works on its
    prompt; so a block that lacks ``k`` tokens is not full for ``k - 1`` steps.
    Whoever finds that a request was slower, or computed more, says so by
    ``expect`` again.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._step = 0
        self._due: dict[str, int] = {}
        self._on: dict[int, dict[str, None]] = {}

    def next_step(self) -> list[str]:
        """Go on by one step; the requests that may complete a block in it."""
        self._step = step = self._step + 1
        due = self._due
        return [r for r in self._on.pop(step, ()) if due.get(r) == step]

    def expect(self, request_id: str, computed: int) -> None:
        """After this step the request has ``computed`` tokens."""
        step = self._step + self._block_size - computed % self._block_size
        if self._due.get(request_id) != step:
            self._due[request_id] = step
            if step in self._on:
                self._on[step][request_id] = None
            else:
                self._on[step] = {request_id: None}

    def forget(self, request_id: str) -> None:
        """The request gives its blocks back; no change if unknown."""
        self._due.pop(request_id, None)
