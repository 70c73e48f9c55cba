"""Steps of the transfer engine that run in CUDA graphs, and the captures that make these."""

from __future__ import annotations

from pie_vllm.engine.handle import EngineHandle


class GraphSteps:
    """The calls that only such steps need; ``TransferEngine.graphs`` is one.

    After ``prepare``, each graph is captured with the engine's gate calls of all layers between
    ``begin_capture`` and ``end_capture``. A step of it is the engine's ``begin_step(graph=True)``,
    ``enter``, the graph's launch, ``end_step``. In steps without a plan a graph may be launched
    without any call: it loads nothing. No graph may be launched after the engine's ``close``.
    """

    def __init__(self, handle: EngineHandle) -> None:
        """No table yet.

        Args:
            handle: the engine's.
        """
        self._handle = handle

    def prepare(self, image: bytes, pieces: int, blocks: int = 8) -> None:
        """Prepare the table and the kernel for captured steps, once; an error changes nothing.

        Whatever ``use_gather`` was told: the copies in a graph are always the kernel's.

        Args:
            image: machine code of ``gather.cu``, see ``pie_vllm.engine.gather``.
            pieces: runs to the device, loads and promotions, that a step in a graph may have.
                Each takes 24 bytes on the device, and four times that on the host.
            blocks: thread blocks of the kernel, 1 to 12.

        Raises:
            UnsupportedError: the driver runs no kernels, or the image is for other devices.
            ConfigError: a size or a number that cannot work.
            TransferError: memory cannot be had, a call failed, the kernel did wrong when tried,
                a step is open, or the table is there already.
        """
        self._handle.call("pie_use_graphs", image, len(image), pieces, blocks)

    def begin_capture(self, compute_stream: int) -> None:
        """Put the copies of the gate calls that follow into the capture of a stream.

        They hold for every later replay of that graph: each layer loads what the table says
        then. The first gate forks from the stream, the last layer joins it again.

        Args:
            compute_stream: stream that the model is being captured on.

        Raises:
            TransferError: the stream is not capturing, a step or a capture is open, or
                ``prepare`` was not called.
        """
        self._handle.call("pie_begin_capture", compute_stream)
        self._handle.writes_wait = True

    def end_capture(self) -> None:
        """End the capture mode, also on an error; before the stream's capture ends.

        Raises:
            GateError: not every layer passed its gates once and in order. The graph must not be
                used.
            TransferError: no capture is open.
        """
        self._handle.writes_wait = False
        self._handle.call("pie_end_capture")

    def enter(self) -> None:
        """Run the open step in a captured graph; its launch on the compute stream follows.

        Fills the table in stream order, and has the compute wait for the stores and for
        what ``begin_step`` loaded. The step has no gates from here on: ``end_step`` comes
        after the launch. Blocks only when four steps in graphs are under way.

        Raises:
            TransferError: the step does not fit a graph, has passed a gate or is in a graph
                already, or a call failed; abort the step.
            GateError: a graph of an earlier step did not copy all its layers.
        """
        self._handle.call("pie_enter_graph")
