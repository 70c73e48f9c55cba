"""An engine of the native library, until it is closed."""

from __future__ import annotations

import ctypes

from pie_vllm.engine.native import error_of
from pie_vllm.errors import TransferError


class EngineHandle:
    """Library and handle; codes become errors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """No engine yet."""
        self._library = library
        self._handle: int | None = None

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._handle is None

    @property
    def native(self) -> tuple[ctypes.CDLL, int]:
        """Library and handle, for ``pie_vllm.engine.streams``.

        Raises:
            TransferError: the engine is closed.
        """
        return self._library, self._open()

    def _open(self) -> int:
        if self._handle is None:
            raise TransferError("the transfer engine is closed")
        return self._handle

    def _check(self, code: int) -> None:
        if code:
            raise error_of(self._library, code)
