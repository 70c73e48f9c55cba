"""The engine's device memory as an address range and as a torch tensor."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from pie_vllm.errors import TransferError, UnsupportedError

if TYPE_CHECKING:
    import torch


class DeviceArena:
    """An address range of the engine, laid out as ``Geometry`` says.

    The arena does not own the memory: views of it keep the engine's Python
    object alive, but after ``TransferEngine.close()`` they must not be touched.

    Attributes:
        address: first byte; a multiple of the mapping granularity.
        size: bytes, ``Geometry.virtual_bytes``; aliased ring pages counted
            once a layer.
        driver: kind of the driver, ``"host"`` or ``"cuda"``.
    """

    def __init__(self, address: int, size: int, driver: str, owner: object) -> None:
        """Describe ``size`` bytes at ``address``, kept alive by ``owner``."""
        self.address = address
        self.size = size
        self.driver = driver
        self._owner: object | None = owner

    def buffer(self) -> Any:
        """A writable ctypes array over the range, without a copy.

        Raises:
            TransferError: the engine is closed.
            UnsupportedError: the memory is not host memory.
        """
        if self._owner is None:
            raise TransferError("the arena's engine is closed")
        if self.driver != "host":
            raise UnsupportedError(f"no host view of the memory of driver {self.driver!r}")
        array: Any = (ctypes.c_int8 * self.size).from_address(self.address)
        array.owner = self._owner
        return array

    def tensor(self) -> torch.Tensor:
        """The range as a one-dimensional int8 tensor, without a copy.

        Raises:
            TransferError: the engine is closed.
            UnsupportedError: the driver's memory cannot be wrapped yet.
        """
        import torch

        return torch.frombuffer(self.buffer(), dtype=torch.int8)

    def release(self) -> None:
        """No further views; called by the engine when it closes."""
        self._owner = None
