"""An engine of the native library, until it is closed."""

from __future__ import annotations

import ctypes
from typing import Any

from pie_vllm.engine.native import error_of
from pie_vllm.errors import TransferError


class EngineHandle:
    """The native library and one engine of it; codes become errors.

    Attributes:
        library: the native library.
        address: the engine's address in the library; None before it is opened and once it is
            closed.
        writes_wait: whether ``before_write`` has to tell the engine.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        """No engine yet."""
        self.library = library
        self.address: int | None = None
        self.writes_wait = False

    def opened(self) -> int:
        """The engine's address.

        Raises:
            TransferError: the engine is closed.
        """
        if self.address is None:
            raise TransferError("the transfer engine is closed")
        return self.address

    def check(self, code: int) -> None:
        """Raise the error that a code of the library stands for, if it stands for one."""
        if code:
            raise error_of(self.library, code)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the library whose first argument is the engine.

        Raises:
            PieError: the engine is closed, or what the function's code stands for.
        """
        self.check(getattr(self.library, name)(self.opened(), *arguments))

    def close(self) -> int | None:
        """Forget the engine; returns its address, None when it was closed before."""
        address, self.address = self.address, None
        self.writes_wait = True  # So that this gate, too, says that the engine is closed.
        return address
