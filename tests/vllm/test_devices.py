"""What differs between devices, as far as it shows without a GPU."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch

from pie_vllm.engine.arena import DeviceArena
from pie_vllm.errors import TransferError, UnsupportedError
from pie_vllm.geometry import Geometry
from pie_vllm.sizing import plan_geometry

pytestmark = pytest.mark.vllm


class Owner:
    """Of memory."""


def test_cuda_memory_is_described_for_torch() -> None:
    """The array interface, version 3: one dimension of int8, writable, no strides."""
    owner = Owner()
    arena = DeviceArena(0x7F0000200000, 12 << 20, "cuda", owner)
    array = arena.cuda_array()
    assert array.__cuda_array_interface__ == {
        "shape": (12 << 20,),
        "typestr": "|i1",
        "data": (0x7F0000200000, False),
        "strides": None,
        "version": 3,
    }
    alive = weakref.ref(owner)
    del owner
    arena.release()
    gc.collect()
    assert alive() is not None, "a view must keep the engine alive"
    del array
    gc.collect()
    assert alive() is None
    with pytest.raises(TransferError, match="closed"):
        arena.cuda_array()


def test_memory_of_one_device_is_no_tensor_of_another() -> None:
    """Nothing is copied silently."""
    cuda = DeviceArena(0x7F0000200000, 4096, "cuda", Owner())
    with pytest.raises(UnsupportedError, match="'cuda' is no memory of device 'cpu'"):
        cuda.tensor("cpu")
    with pytest.raises(UnsupportedError, match="no host view"):
        cuda.buffer()
    host = DeviceArena(0x1000, 4096, "host", Owner())
    with pytest.raises(UnsupportedError, match="'host' is no memory of device 'cuda:1'"):
        host.tensor(torch.device("cuda", 1))
    with pytest.raises(UnsupportedError, match="no CUDA view"):
        host.cuda_array()


def test_memory_of_a_device_with_a_number_is_a_tensor_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of that one: ``cuda:1`` is a driver's name as well as a device's."""
    arena = DeviceArena(0x7F0000200000, 4096, "cuda:1", Owner())
    asked = []

    class Tensor:
        """What torch would make of the memory."""

        def data_ptr(self) -> int:
            return arena.address

    def as_tensor(array: object, device: torch.device) -> Tensor:
        asked.append((array, device))
        return Tensor()

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    assert (arena.driver, arena.index) == ("cuda", 1)
    for device in (None, "cuda:1", torch.device("cuda", 1)):
        arena.tensor(device)
    assert [where for _, where in asked] == [torch.device("cuda", 1)] * 3
    for device in ("cuda:0", "cuda", "cpu"):
        with pytest.raises(UnsupportedError, match="'cuda:1' is no memory of device"):
            arena.tensor(device)


@pytest.mark.parametrize(
    ("mine", "other"),
    [
        ("pie_vllm.vllm.worker_side.gpu_worker", "vllm.v1.worker.cpu_worker"),
        ("pie_vllm.vllm.worker_side.cpu_worker", "pie_vllm.vllm.worker_side.gpu_worker"),
    ],
)
def test_a_worker_imports_no_other_devices_worker(mine: str, other: str) -> None:
    """vLLM's CPU worker replaces parts of torch.cuda when it is imported."""
    code = f"import sys, {mine}; sys.exit({other!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], timeout=200, check=False)
    assert done.returncode == 0


def cuda_geometry(page_bytes: int, device_bytes: int, layers: int = 32) -> Geometry:
    """Sizes with the granularity of CUDA, 2 MiB."""
    return plan_geometry(
        num_layers=layers,
        page_bytes=page_bytes,
        device_bytes=device_bytes,
        pool_bytes=8 << 30,
        granularity=2 << 20,
        needed_blocks=100,
        fed_blocks=500,
    )


@pytest.mark.parametrize("page_bytes", [32 << 10, 64 << 10, 17 * 1024, 3 << 20])
def test_ring_and_residents_fit_the_memory_that_vllm_gives(page_bytes: int) -> None:
    """All mapped in pieces of 2 MiB: vLLM's budget holds, rounding included."""
    budget = 14 << 30
    g = cuda_geometry(page_bytes, budget)
    assert g.device_bytes <= budget
    assert g.device_bytes > budget * 0.97
    for size in (g.layer_resident_bytes, g.slot_bytes, g.layer_stride, g.virtual_bytes):
        assert size % (2 << 20) == 0
    boundary = g.page_offset(5, g.resident_blocks)
    assert boundary % (2 << 20) == 0, "the ring begins on a piece of its own"
