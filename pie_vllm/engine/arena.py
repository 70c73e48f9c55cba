"""The engine's device memory as an address range and as a torch tensor."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from pie_vllm.errors import TransferError, UnsupportedError

if TYPE_CHECKING:
    import torch


class _CudaArray:
    """What torch needs to know to view CUDA memory; keeps its owner alive.

    Attributes:
        owner: owner of the memory.
    """

    def __init__(self, address: int, size: int, owner: object) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|i1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


class DeviceArena:
    """An address range of the engine, laid out as ``Geometry`` says.

    The arena does not own the memory: views of it keep the engine's Python
    object alive, but after ``TransferEngine.close()`` they must not be touched.

    Attributes:
        address: address of the first byte; a multiple of the mapping granularity.
        size: size in bytes, ``Geometry.virtual_bytes``; aliased ring pages counted
            once a layer.
        driver: kind of the driver, ``"host"`` or ``"cuda"``.
        index: number of the device, where the driver was told one (``"cuda:1"``).
    """

    def __init__(self, address: int, size: int, driver: str, owner: object) -> None:
        """Describe ``size`` bytes at ``address``, kept alive by ``owner``; ``driver`` as opened."""
        self.address = address
        self.size = size
        self.driver, _, index = driver.partition(":")
        self.index = int(index) if index else None
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

    def cuda_array(self) -> Any:
        """An object with ``__cuda_array_interface__`` over the range: int8, one dimension.

        Raises:
            TransferError: the engine is closed.
            UnsupportedError: the memory is not CUDA memory.
        """
        if self._owner is None:
            raise TransferError("the arena's engine is closed")
        if self.driver != "cuda":
            raise UnsupportedError(f"no CUDA view of the memory of driver {self.driver!r}")
        return _CudaArray(self.address, self.size, self._owner)

    def tensor(self, device: torch.device | str | None = None) -> torch.Tensor:
        """The range as a one-dimensional int8 tensor, without a copy.

        Args:
            device: device that the memory is on; None is the driver's own device.

        Raises:
            TransferError: the engine is closed, or torch would have made a copy.
            UnsupportedError: the driver's memory is not on that device.
        """
        import torch

        kind = "cpu" if self.driver == "host" else self.driver
        own = torch.device(kind) if self.index is None else torch.device(kind, self.index)
        where = own if device is None else torch.device(device)
        if where.type != kind or self.index not in (None, where.index):
            name = self.driver if self.index is None else str(own)
            raise UnsupportedError(
                f"the memory of driver {name!r} is no memory of device {str(where)!r}"
            )
        if kind == "cpu":
            return torch.frombuffer(self.buffer(), dtype=torch.int8)
        tensor = torch.as_tensor(self.cuda_array(), device=where)
        if tensor.data_ptr() != self.address:
            raise TransferError(
                f"the arena at {self.address:#x} is not memory of {where}: torch copied it"
            )
        return tensor

    def release(self) -> None:
        """No further views; called by the engine when it closes."""
        self._owner = None
