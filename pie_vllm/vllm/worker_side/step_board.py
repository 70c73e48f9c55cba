"""What the ranks of one engine tell each other of a step: whether all of its copies were right.

vLLM returns one rank's output of a step. Where a copy failed on another rank, that output is wrong,
too: each layer sums what all ranks computed.
"""

from __future__ import annotations

import os
import time
from mmap import mmap
from pathlib import Path

from pie_vllm.errors import IntegrityError, TransferError

STEPS = 64
"""Newest steps that a board remembers; two are in flight at most."""

TEXT_BYTES = 512
"""Longest error text on a board."""

WAIT_SECONDS = 120.0
"""Longest wait for a rank to end a step that this one has ended; they differ by milliseconds."""

LOOK_SECONDS = 2e-5
"""Pause between two looks at a step that another rank has not ended."""

_WORD = 8
_RECORD = STEPS * _WORD + TEXT_BYTES


class StepBoard:
    """A memory-mapped file with a record for each rank, which that rank alone writes.

    A record has one 64-bit word for each of the newest steps, written when the rank has ended the
    step: twice the step's number, plus one if a copy failed. Each word is stored at once, so a
    reader needs no lock. Behind the words is the text of the newest failure.

    Attributes:
        leads: whether this is the rank whose output vLLM returns.
    """

    def __init__(self, memory: mmap, rank: int, ranks: int) -> None:
        """Join a board.

        Args:
            memory: from ``create`` on one rank, from ``join`` on the others.
            rank: number of this rank; 0 leads.
            ranks: number of ranks.
        """
        self.leads = rank == 0
        self._memory = memory
        self._words = memoryview(memory).cast("q")
        self._rank = rank
        self._others = [other for other in range(ranks) if other != rank]

    @staticmethod
    def create(path: Path, ranks: int) -> mmap:
        """Memory of a new board at a path that does not exist. Raises OSError."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(descriptor, ranks * _RECORD)
            return mmap(descriptor, ranks * _RECORD)
        finally:
            os.close(descriptor)

    @staticmethod
    def join(path: Path, ranks: int) -> mmap:
        """Memory of the board that another rank has created at that path. Raises OSError."""
        descriptor = os.open(path, os.O_RDWR)
        try:
            return mmap(descriptor, ranks * _RECORD)
        finally:
            os.close(descriptor)

    def post(self, step: int, failure: str = "") -> None:
        """This rank has ended a step.

        Args:
            step: number of the step's plan.
            failure: error text of a copy that failed; empty if none did.
        """
        if failure:
            text = failure.encode(errors="replace")[:TEXT_BYTES]
            start = self._rank * _RECORD + STEPS * _WORD
            self._memory[start : start + TEXT_BYTES] = text.ljust(TEXT_BYTES, b"\0")
        self._words[_word(self._rank, step)] = 2 * step + bool(failure)

    def failure(self, step: int) -> str:
        """What failed in a step on another rank; empty if nothing did. Waits until all ended it.

        Args:
            step: number of the step's plan, which this rank has ended.

        Raises:
            TransferError: a rank does not end the step.
            IntegrityError: the step is too old.
        """
        for rank in self._others:
            if self._failed(rank, step):
                return f"on rank {rank}: {self._text(rank)}"
        return ""

    def _failed(self, rank: int, step: int) -> bool:
        place = _word(rank, step)
        word = self._words[place]
        if word >> 1 != step:
            word = self._wait(rank, step)
        return bool(word & 1)

    def _wait(self, rank: int, step: int) -> int:
        place, deadline = _word(rank, step), time.monotonic() + WAIT_SECONDS
        while (word := self._words[place]) >> 1 < step:
            if time.monotonic() > deadline:
                raise TransferError(
                    f"rank {rank} has not ended step {step} within {WAIT_SECONDS:.0f} s: see what "
                    "it has logged, and start the server anew."
                )
            time.sleep(LOOK_SECONDS)
        if word >> 1 > step:
            raise IntegrityError(f"rank {rank} is {STEPS} steps ahead of step {step}")
        return word

    def _text(self, rank: int) -> str:
        start = rank * _RECORD + STEPS * _WORD
        text = bytes(self._memory[start : start + TEXT_BYTES])
        return text.rstrip(b"\0").decode(errors="replace")


def _word(rank: int, step: int) -> int:
    """Index of a step's word on the board."""
    return rank * (_RECORD // _WORD) + step % STEPS
