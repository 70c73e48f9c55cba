"""The cache engine of one rank: its memory, and the steps' copies around the model's passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from vllm.logger import init_logger

from pie_vllm.config import PieConfig
from pie_vllm.engine.gather import use_gather
from pie_vllm.engine.host_budget import taking
from pie_vllm.engine.link_calibration import UNMEASURED_CTAS
from pie_vllm.engine.pool_board import Board
from pie_vllm.engine.pool_keeper import PoolKeeper
from pie_vllm.engine.step_stats import StepStats
from pie_vllm.engine.transfer_engine import TransferEngine
from pie_vllm.errors import CopyError, GateError, TransferError, UnsupportedError
from pie_vllm.geometry import Geometry
from pie_vllm.plan import NO_RUNS, StepOrders, StepPlan, Totals
from pie_vllm.vllm import refusals
from pie_vllm.vllm.compat import cuda_graphs, mla_layers, model_runner
from pie_vllm.vllm.worker_side import gate, kv_layout, mla_gate
from pie_vllm.vllm.worker_side.full_graphs import FullGraphs, use_graphs
from pie_vllm.vllm.worker_side.step_totals import with_step

logger = init_logger("vllm.pie")

START_SECONDS = 600.0
"""Longest wait at start for other engines of the host that take their memory just then."""


class PieCacheEngine:
    """Owns the KV memory of one worker and carries out step plans.

    vLLM has no CacheEngine class any more; the model runner allocates. This
    object gives it the memory and stands between it and the transfer engine.

    Attributes:
        geometry: sizes of this rank's memory.
        totals: sums over all steps so far.
        keeper: holder of the pool's memory.
        allocated: whether vLLM has taken its KV tensors from here.
        failure: error of the newest step's first failed copy; None if none failed. See ``step``.
    """

    def __init__(
        self,
        config: PieConfig,
        geometry: Geometry,
        driver: str,
        gather_below: int = 0,
        gather_blocks: int = UNMEASURED_CTAS,
        board: Board | None = None,
        first_chunks: int = 1,
    ) -> None:
        """Reserve arena and pool and test the hand-over on this machine.

        Args:
            config: the checked settings.
            geometry: sizes of this rank's memory.
            driver: name of the transfer engine's driver.
            gather_below: bytes of a piece below which loads were faster by the gather kernel.
            gather_blocks: number of CTAs of that kernel, in graphs too.
            board: where the ranks tell each other of their pools; None for a single rank.
            first_chunks: chunks of the pool that are taken now and never given back.

        Raises:
            TransferError: memory cannot be had, or the self-test fails.
            NativeLibraryError: the native engine is missing or does not fit.
        """
        self.geometry = geometry
        self.totals = Totals()
        self.allocated = False
        self.failure: TransferError | None = None
        self._switch = gate.GateSwitch(self._fail)
        self._loads = NO_RUNS
        self._resend = False
        self._full_graphs = config.full_graphs
        self._gather_blocks = gather_blocks
        self._graphs: FullGraphs | None = None
        self._engine = _open(config, geometry, driver, first_chunks)
        self.keeper = PoolKeeper(
            self._engine,
            geometry.chunk_rows,
            idle_seconds=config.pool_idle_seconds,
            first_chunks=first_chunks,
            budget=partial(taking, geometry.bytes_of_chunks(1)),
            board=board,
        )
        if driver != "host":
            logger.info("Pie: %s", use_gather(self._engine, gather_below, blocks=gather_blocks))
        if config.debug:
            logger.warning(
                "Pie: debug switches %s are on: answers may be wrong on purpose, and the self-test "
                "is left out.",
                ", ".join(config.debug),
            )
            return
        try:
            self._engine.self_test()
        except BaseException:
            self.close()
            raise

    def allocate(
        self, kv_cache_config: Any, device: Any, layout: Any, kernel_block_sizes: Any = None
    ) -> dict[str, Any]:
        """Stand in for vLLM's ``allocate_kv_cache``: the same views, over the arena.

        Raises:
            UnsupportedError: the layout does not keep a page of a layer together.
        """
        arena = self._engine.arena.tensor(device)
        found = kv_layout.views(arena, kv_cache_config, layout, kernel_block_sizes)
        self.allocated = True
        return found

    def install_gates(self, layer_names: Sequence[str], forward_context: dict[str, Any]) -> None:
        """Put gates around the attention of each layer, in the order of the ring."""
        for layer, name in enumerate(layer_names):
            attention = forward_context[name]
            if mla_layers.is_mla(attention):
                mla_gate.install(attention, layer, self._switch)
            else:
                gate.install(attention.impl, layer, self._switch)

    @contextmanager
    def warm_up(
        self, runner: Any, capturing: Callable[[], bool], stream: Callable[[], int]
    ) -> Iterator[None]:
        """Enclose vLLM's warm-up and its capture of graphs, and zero the ring after it.

        Warm-up writes to pages that kernels may load later. The pool's thread rests meanwhile.

        Args:
            runner: vLLM's model runner, with its KV cache.
            capturing: tells whether what this thread submits now is captured.
            stream: gives the stream that it submits to.

        Raises:
            UnsupportedError: the graphs do not hold the copies of all layers.
        """
        with self.keeper.paused():
            if self._graphs is None:
                yield
            else:
                with self._graphs.captured(runner, capturing, stream) as capture:
                    self._switch.engine = capture
                    try:
                        yield
                    finally:
                        self._switch.engine = None
        self._engine.zero_ring()

    @contextmanager
    def step(self, plan: StepPlan | None, compute_stream: int = 0) -> Iterator[None]:
        """Carry out ``plan`` around the model's forward pass.

        A copy that fails is no error here: the rest of the pass runs without gates, and
        ``failure`` is set. Then neither the rows that the plan stores to, nor the pages that it
        fills, nor anything computed by requests that read its loads can be trusted.

        Args:
            plan: plan of this very step; None runs it without gates.
            compute_stream: stream that the model runs on.

        Raises:
            GateError: a layer ran without its gate; the step's tokens are not
                returned.
            TransferError: a copy failed, and the device cannot go on.
        """
        self.failure = None
        if plan is None:
            yield
            return
        if plan.loads is not None:
            self._loads = plan.loads
        elif self._resend:  # The engine may not have heard of those of the step before.
            plan = plan._replace(loads=self._loads)
        if not plan.forward:
            yield
            self._run_idle(plan, compute_stream)
            return
        if not self._begin(plan, compute_stream):
            yield
            return
        in_graph = False
        try:
            yield
            stats = self._end()
        except BaseException:
            if self._switch.engine is not None:  # Else it was aborted where a copy failed.
                self._engine.abort_step()
            raise
        finally:
            self._switch.engine = None
            if self._graphs is not None:
                in_graph = self._graphs.end_step()
        if stats is None:
            return
        if stats.gates != self.geometry.num_layers:
            raise GateError(f"{stats.gates} of {self.geometry.num_layers} layers passed a gate")
        self.totals = with_step(self.totals, plan, stats, in_graph=in_graph)

    def _begin(self, plan: StepPlan, compute_stream: int) -> bool:
        """Submit the first copies of a step that runs the model; whether none of them failed."""
        self.keeper.prepare(plan.stores, plan.promotions, plan.loads)
        try:
            if self._graphs is None:
                self._engine.begin_step(plan, compute_stream)
            else:
                self._graphs.begin_step(plan, compute_stream)
        except CopyError as error:
            self._fail(error)
            return False
        self._resend = False
        self._switch.engine = self._engine
        return True

    def _run_idle(self, plan: StepPlan, compute_stream: int) -> None:
        self.keeper.prepare(plan.stores, plan.promotions, plan.loads)
        try:
            stats = self._engine.run_idle(plan, compute_stream)
        except CopyError as error:
            self._fail(error)
            return
        self._resend = False
        self.totals = with_step(self.totals, plan, stats)

    def _end(self) -> StepStats | None:
        """Close the step; None where a copy of it failed."""
        if self.failure is None:
            try:
                return self._engine.end_step()
            except CopyError as error:
                self._fail(error)
        return None

    def _fail(self, error: TransferError) -> None:
        """Note that a copy of the step failed, and make the engine ready for the next step.

        Raises:
            TransferError: the device cannot go on.
        """
        self._switch.engine = None
        try:
            self._engine.abort_step()
        except TransferError as lost:
            raise TransferError(
                f"a copy of KV failed, and the device cannot go on: {error}; then {lost}. Start "
                "the server anew."
            ) from error
        self.failure, self._resend = error, True

    def needs_gates(self) -> bool:
        """Whether a step with a plan runs now, and its layers must pass the gates one by one."""
        fits = self._graphs is not None and self._graphs.fits
        return self._switch.engine is self._engine and not fits

    def install_in_runner(self, runner: Any, group: int) -> None:
        """Make the model runner apply a plan's relabels, and keep FULL graphs from its steps.

        With ``--pie-full-graphs``, a step whose copies fit a FULL graph may run in one.

        Args:
            runner: vLLM's model runner.
            group: index of the pooled group.

        Raises:
            UnsupportedError: this vLLM's runner does it otherwise, it has FULL graphs only, or
                the device cannot copy in them.
        """

        def relabel(scheduler_output: Any) -> None:
            if scheduler_output.kv_cache_block_copies:
                raise UnsupportedError(
                    "--block-manager pie cannot carry out kv_cache_block_copies: pages of pooled "
                    "blocks are not on the device. Set --no-enable-prefix-caching, or use "
                    "--block-manager default."
                )
            orders: StepOrders | None = getattr(scheduler_output, "pie", None)
            if orders and orders.plan and orders.plan.relabels:
                gone = scheduler_output.finished_req_ids
                live = [r for r in orders.plan.relabels if r.request_id not in gone]
                model_runner.relabel_rows(runner, live, group)

        model_runner.before_inputs(runner, relabel)
        mode = cuda_graphs.graph_mode(runner)
        refusals.check_graph_mode(mode)
        if self._full_graphs and mode.has_full_cudagraphs():
            logger.warning("Pie: %s", use_graphs(self._engine, blocks=self._gather_blocks))
            self._graphs = FullGraphs(self._engine, self.geometry.num_layers, self._fail)
        elif self._full_graphs:
            logger.warning("Pie: cudagraph_mode %s: --pie-full-graphs changes nothing", mode)
        cuda_graphs.veto_full_graphs(runner, self.needs_gates)

    def close(self) -> None:
        """Give all memory back. No tensor over the arena may be used after."""
        self.keeper.close()
        self._engine.close()


def _open(config: PieConfig, geometry: Geometry, driver: str, chunks: int) -> TransferEngine:
    """The transfer engine with the pool's first chunks. Memory that is not free is never taken.

    Raises:
        TransferError: the memory cannot be had.
    """
    first = geometry.bytes_of_chunks(chunks)
    device = geometry.device_bytes if driver == "host" else 0
    try:
        with taking(first + device, seconds=START_SECONDS):
            return TransferEngine(
                geometry,
                driver=driver,
                link_bytes_per_s=config.emulated_link,
                debug=config.debug,
                chunks=chunks,
            )
    except TransferError as error:
        raise TransferError(
            f"--block-manager pie cannot start: it takes {device / 2**20:.0f} MiB for KV on the "
            f"device and {first / 2**20:.0f} MiB for the beginning of its pool from CPU memory. "
            f"{error} Free CPU memory, lower --kv-cache-memory-bytes or --pie-pool-gib, or use "
            "--block-manager default."
        ) from error
