"""Steps that load KV inside vLLM's FULL CUDA graphs (``--pie-full-graphs``).

While vLLM captures such a graph, its Python runs once and passes the gates, so the engine's copies
become part of the graph. Later the graph replays without Python: the engine is told right before,
and uploads which blocks the step's copies name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pie_vllm.engine.gather import Images, NoGather, gather_image, install_image
from pie_vllm.engine.link_calibration import UNMEASURED_CTAS
from pie_vllm.errors import CopyError, GateError, PieError
from pie_vllm.vllm import refusals
from pie_vllm.vllm.compat import cuda_graphs

if TYPE_CHECKING:
    from pie_vllm.engine.transfer_engine import TransferEngine
    from pie_vllm.plan import StepPlan


PIECES_MAX = 8192
"""Maximum number of pieces that a layer loads in a graph: more than a link brings while a step
computes."""


def use_graphs(
    engine: TransferEngine, *, images: Images = gather_image, blocks: int = UNMEASURED_CTAS
) -> str:
    """Prepare the engine for steps in graphs.

    Args:
        engine: the transfer engine of this rank.
        images: gives the kernel's compiled image; tests pass their own.
        blocks: number of CTAs of the kernel that copies in a graph.

    Returns:
        A sentence for the log.

    Raises:
        UnsupportedError: the device, or this installation, has no kernel that copies in a graph.
    """
    # A step moves no block twice. Restored blocks may come on top: such a step runs piecewise.
    pieces = min(engine.geometry.pooled_blocks, PIECES_MAX)
    try:
        found = install_image(
            engine, lambda image: engine.graphs.prepare(image, pieces, blocks), images=images
        )
    except PieError as error:
        raise refusals.no_full_graphs(f"the gather kernel cannot be used: {error}") from error
    if isinstance(found, NoGather):
        raise refusals.no_full_graphs(f"there is no gather kernel: {found.reason}")
    return (
        "steps that only decode load KV inside FULL CUDA graphs (--pie-full-graphs: experimental, "
        f"not yet proven on a GPU), up to {pieces} pieces a layer"
    )


class Capture:
    """Passes the gates on to the engine while a FULL graph is captured; inert otherwise.

    Forward passes that warm up are not captured, and a PIECEWISE graph is captured in pieces
    between the layers' attention. No call raises: CUDA would report an error inside a capture as a
    broken capture. ``error`` keeps the first one.

    Attributes:
        complete: number of graphs in which all layers passed their gates.
        error: first error of the engine; None if there was none.
    """

    def __init__(
        self,
        engine: TransferEngine,
        num_layers: int,
        capturing: Callable[[], bool],
        stream: Callable[[], int],
    ) -> None:
        """Nothing is captured yet.

        Args:
            engine: transfer engine, prepared by ``use_graphs``.
            num_layers: number of layers that pass the gates.
            capturing: tells whether what this thread submits now is captured.
            stream: gives the stream that it submits to.
        """
        self._engine, self._last = engine, num_layers - 1
        self._capturing, self._stream = capturing, stream
        self._open = False
        self.complete = 0
        self.error: PieError | None = None

    def before_write(self, layer: int) -> None:
        """Pass the gate before a layer's KV write, in a capture."""
        self._pass(self._engine.before_write, layer)

    def before_attention(self, layer: int) -> None:
        """Pass the gate before a layer's attention, in a capture."""
        self._pass(self._engine.before_attention, layer)

    def after_attention(self, layer: int) -> None:
        """Pass the gate after a layer's attention; after the last layer the capture is complete."""
        self._pass(self._engine.after_attention, layer)
        if self._open and layer == self._last:
            self.end()

    def end(self) -> None:
        """End the engine's part of a capture, if one is under way."""
        if not self._open:
            return
        self._open = False
        try:
            self._engine.graphs.end_capture()
            self.complete += 1
        except PieError as error:
            self.error = self.error or error

    def _pass(self, gate: Callable[[int], None], layer: int) -> None:
        if not self._capturing():
            self.end()  # The engine reports a capture that did not come to its last layer.
            return
        if self.error is not None:
            return
        try:
            if not self._open:
                self._engine.graphs.begin_capture(self._stream())
                self._open = True
            gate(layer)
        except PieError as error:
            self.error = error
            self.end()


class FullGraphs:
    """Tells the engine of captures and replays.

    Attributes:
        fits: whether the open step may run in a FULL graph; False where no step is open.
        entered: whether the open step's graph has been launched, or is about to be.
    """

    def __init__(
        self, engine: TransferEngine, num_layers: int, failed: Callable[[CopyError], None]
    ) -> None:
        """Nothing is open.

        Args:
            engine: transfer engine, prepared by ``use_graphs``.
            num_layers: number of layers that pass the gates.
            failed: called with the error of a copy that failed. The graph is launched all the
                same, and copies nothing.
        """
        self._engine, self._layers, self._failed = engine, num_layers, failed
        self._open = False
        self.fits = self.entered = False

    def begin_step(self, plan: StepPlan, compute_stream: int) -> None:
        """Begin a step in the engine, and find out whether it fits a graph."""
        self.fits = self._engine.begin_step(plan, compute_stream, graph=True)
        self._open = True

    def end_step(self) -> bool:
        """Close the step, however it ended; returns whether it ran in a graph."""
        entered = self.entered
        self._open = self.fits = self.entered = False
        return entered

    def before_replay(self) -> None:
        """Tell the engine that this thread launches a FULL graph next.

        Raises:
            GateError: a graph was launched in this step before.
            TransferError: the step does not fit a graph, or the device cannot go on.
        """
        if not self._open:
            return
        if self.entered:
            raise GateError("two FULL CUDA graphs were launched in one step")
        try:
            self._engine.graphs.enter()
        except CopyError as error:
            self._open = self.fits = False
            self._failed(error)
            return
        self.entered = True

    @contextmanager
    def captured(
        self, runner: Any, capturing: Callable[[], bool], stream: Callable[[], int]
    ) -> Iterator[Capture]:
        """Enclose vLLM's capture of a runner's graphs; gives the object that stands at the gates.

        Args:
            runner: vLLM's model runner.
            capturing: see ``Capture``.
            stream: see ``Capture``.

        Raises:
            UnsupportedError: one of vLLM's FULL graphs lacks the copies of some layer.
        """
        capture = Capture(self._engine, self._layers, capturing, stream)
        try:
            yield capture
        except Exception as error:
            capture.end()
            if capture.error is None:
                raise
            raise refusals.no_full_graphs(f"no graph can be captured: {capture.error}") from error
        capture.end()
        if capture.error is not None:
            raise refusals.no_full_graphs(f"no graph can be captured: {capture.error}")
        graphs = cuda_graphs.full_graphs(runner)
        if capture.complete != len(graphs):
            raise refusals.no_full_graphs(
                f"only {capture.complete} of {len(graphs)} FULL CUDA graphs passed the gates of "
                "all layers while vLLM captured them"
            )
        for graph in graphs:
            cuda_graphs.before_replay(graph, self.before_replay)
