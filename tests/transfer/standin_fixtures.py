"""What the tests of the stand-in for libcuda share."""

from __future__ import annotations

import ctypes
import re
import threading

from tests.helpers.cuda_calls import Cuda

HOST_FN = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def violation(cuda: Cuda, pattern: str) -> None:
    """There is exactly one, and it says so."""
    found = cuda.standin.violations()
    assert len(found) == 1, found
    assert re.search(pattern, found[0]), found


def clean(cuda: Cuda) -> None:
    assert cuda.standin.violations() == []


class Gate:
    """A host function that holds a stream until the test lets it pass."""

    def __init__(self, cuda: Cuda, stream: int) -> None:
        self._open = threading.Event()
        self._function = HOST_FN(lambda _: self._open.wait(20) and None)
        cuda.do("cuLaunchHostFunc", stream, self._function, None)

    def open(self) -> None:
        self._open.set()
