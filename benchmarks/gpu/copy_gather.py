"""The gather kernel at several widths, by itself: how fast it copies, and whether rightly.

It is launched here through the CUDA driver's own functions, as any module; the sizes are those of
`single copies`, so that the rows can be laid beside what the copy engines do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.copy_plans import KIB, Sizes
from benchmarks.gpu.harness.compute import Compute, middle, new_stream, timed_event
from benchmarks.gpu.harness.context import Context
from benchmarks.gpu.harness.machine import load_cuda
from pie_vllm.engine.gather import ENTRY, GatherImage, gather_image

CTAS = (1, 2, 4, 8, 12)
THREADS = 512
PIECE_BYTES_MAX = 256 * KIB
WEIGHT_SETS, PASSES = 4, 8
BESIDE_PIECE = 64 * KIB
BESIDE_ROWS = (32, 256)
BESIDE_REPEATS = 5
BESIDE = "gather kernel: compute beside it"
TABLE = "gather kernel: pieces from pinned memory in one launch"


def gather(context: Context, compute: Compute, sizes: Sizes, peak: float) -> None:
    """All widths, pieces and counts; wrong bytes fail the stage."""
    if context.dry:
        context.report.note("gather kernel: needs a GPU")
        return
    properties: Any = torch.cuda.get_device_properties(compute.device)
    kernel = load(context, f"sm_{properties.major}{properties.minor}")
    if kernel is None:
        return
    area = min(sizes.area, 64 << 20)
    source = compute.pinned(2 * area)
    source.view(torch.int64).random_()
    target = torch.zeros(2 * area, dtype=torch.int8, device=compute.device)
    wrong = 0
    with compute.on():
        for piece in (piece for piece in sizes.pieces if piece <= PIECE_BYTES_MAX):
            for count in (count for count in sizes.counts if count * piece <= area):
                if not context.has_time(5, "all sizes of the gather kernel"):
                    return
                table = pieces(target, source, piece, count)
                target.zero_()
                for ctas in CTAS:
                    times = [kernel.seconds(table, ctas) for _ in range(sizes.repeats + 1)][1:]
                    rate = piece * count / middle(times)
                    context.report.row(
                        TABLE,
                        piece_KiB=piece // KIB,
                        count=count,
                        ctas=ctas,
                        GBps=rate / 1e9,
                        share_of_peak=rate / peak,
                    )
                there = target.view(-1, 2, piece)[:count, 0].cpu()
                wrong += int((there != source.view(-1, 2, piece)[:count, 0]).sum())
                wrong += int(target.view(-1, 2, piece)[:count, 1].count_nonzero())
    context.report.check("bytes that the gather kernel left wrong", wrong, "0", wrong == 0)
    table = pieces(target, source, BESIDE_PIECE, area // BESIDE_PIECE)
    stream = new_stream(-1)

    def launch(ctas: int) -> Callable[[], float]:
        return kernel.start(table, ctas, stream)

    for rows in BESIDE_ROWS:
        beside(context, compute, Products(compute, rows), launch, area)


class Products:
    """Products of matrices as large as a decode step's, the largest of an 8B model's layers.

    Args:
        compute: where.
        rows: requests of the step.
    """

    def __init__(self, compute: Compute, rows: int, hidden: int = 4096, gated: int = 28672) -> None:
        options: Any = {"dtype": compute.dtype, "device": compute.device}
        self.rows = rows
        self._input = torch.randn(rows, hidden, **options)
        self._weights = [torch.randn(hidden, gated, **options) for _ in range(WEIGHT_SETS)]

    def run(self) -> None:
        """Submit all of them."""
        for _ in range(PASSES):
            for weights in self._weights:
                self._input @ weights


def beside(
    context: Context,
    compute: Compute,
    products: Products,
    launch: Callable[[int], Callable[[], float]],
    size: int,
) -> None:
    """What the kernel takes from compute, by its CTAs, and what it copies meanwhile.

    Args:
        context: context of the stage.
        compute: where the products run.
        products: the compute.
        launch: a kernel of so many CTAs on a stream of its own; what it returns waits for it.
        size: bytes that a launch copies.
    """

    def seconds() -> float:
        start = compute.mark()
        products.run()
        return compute.seconds(start, compute.mark())

    with compute.on():
        seconds()
        for ctas in CTAS:
            if not context.has_time(3, f"compute beside {ctas} CTAs and more"):
                return
            ratios, rates, alone = [], [], []
            for _ in range(BESIDE_REPEATS):
                alone.append(seconds())
                compute.synchronize()
                copied = [launch(ctas) for _ in range(2)]
                together = seconds()
                taken = [each() for each in copied]
                ratios.append(together / alone[-1])
                rates.append(size * len(taken) / sum(taken))
            context.report.row(
                BESIDE,
                requests=products.rows,
                ctas=ctas,
                alone_ms=1e3 * middle(alone),
                slowdown=middle(ratios),
                GBps=middle(rates) / 1e9,
                covered=min(1.0, size * 2 / middle(rates) / middle(alone)),
            )


def load(context: Context, arch: str) -> Kernel | None:
    """The kernel as compiled with the engine, else as NVRTC compiles it; notes where neither is."""
    for ahead in (True, False):
        found = gather_image(arch, ahead=ahead)
        if not isinstance(found, GatherImage):
            context.report.note(f"gather kernel: not built: {found.reason}")
            return None
        try:
            kernel = Kernel(found.image)
        except RuntimeError as error:  # Compiled for other architectures, perhaps.
            context.report.note(f"gather kernel, compiled {found.origin}: {error}")
            continue
        context.report.fact("gather kernel, compiled", found.origin)
        return kernel
    return None


class Table(NamedTuple):
    """What a launch is given, as ``gather.cu`` says.

    Attributes:
        entries: on the device, a row of 24 bytes a piece.
        base: address of block 0.
        page: bytes of a page.
    """

    entries: torch.Tensor
    base: int
    page: int


def pieces(target: torch.Tensor, source: torch.Tensor, piece: int, count: int) -> Table:
    """A table of every second piece of both: pages of one layer of one chunk."""
    entries = torch.zeros(count, 6, dtype=torch.int32)
    places = 2 * torch.arange(count, dtype=torch.int32)
    entries.view(torch.int64)[:, 0] = source.data_ptr()
    entries[:, 2] = 2 * count
    entries[:, 3] = entries[:, 4] = places
    entries[:, 5] = 1
    return Table(entries.to(target.device), target.data_ptr(), piece)


class Kernel:
    """The loaded kernel.

    Raises:
        RuntimeError: the driver refused it.
    """

    def __init__(self, image: bytes) -> None:
        library = load_cuda()
        assert library is not None
        self._library, self._image = library, ctypes.create_string_buffer(image)
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), self._image)
        self._call("cuModuleGetFunction", ctypes.byref(self._function), module, ENTRY.encode())

    def seconds(self, table: Table, ctas: int) -> float:
        """One launch over a table, on torch's current stream."""
        stream: Any = torch.cuda.current_stream()
        return self.start(table, ctas, stream)()

    def start(self, table: Table, ctas: int, stream: Any) -> Callable[[], float]:
        """Launch over a table; what is returned waits for it, and tells its seconds."""
        entries, layer = table.entries, 0
        count = torch.tensor([len(entries)], dtype=torch.int64, device=entries.device)
        stream.wait_stream(torch.cuda.current_stream())
        counted = 0  # Nobody counts the launches.
        bases = table.base, table.page, layer
        numbers = entries.data_ptr(), count.data_ptr(), counted, *bases
        arguments = [ctypes.c_uint64(number) for number in numbers]
        addresses = (ctypes.c_void_p * len(arguments))(
            *(ctypes.addressof(each) for each in arguments)
        )
        start, end = timed_event(), timed_event()
        held = [entries, count]  # Until it is over.
        start.record(stream)
        self._call(
            "cuLaunchKernel",
            self._function,
            *(ctypes.c_uint(number) for number in (ctas, 1, 1, THREADS, 1, 1, 0)),
            ctypes.c_void_p(stream.cuda_stream),
            addresses,
            None,
        )
        end.record(stream)

        def taken() -> float:
            end.synchronize()
            held.clear()
            return float(start.elapsed_time(end)) / 1e3

        return taken

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} of the gather kernel: CUDA error {code}")
