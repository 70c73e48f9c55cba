"""vLLM's workers with the pie cache engine in place of their KV allocation."""

from __future__ import annotations

from functools import partial
from typing import Any

from vllm.logger import init_logger

from pie_vllm.engine.link_calibration import UNMEASURED_CTAS, measure_link
from pie_vllm.errors import PieError, TransferError, UnsupportedError
from pie_vllm.geometry import (
    UNKNOWN_LINK_FRACTION,
    Geometry,
    blocks_fed,
    cdiv,
    check_device_bytes,
    page_table_bytes,
    plan_geometry,
)
from pie_vllm.plan import Prior, StepOrders
from pie_vllm.vllm import refusals, settings
from pie_vllm.vllm.compat import model_runner
from pie_vllm.vllm.whole import whole_of
from pie_vllm.vllm.worker_side import ranks
from pie_vllm.vllm.worker_side.cache_engine import PieCacheEngine
from pie_vllm.vllm.worker_side.failures import end_rank, said_once
from pie_vllm.vllm.worker_side.output_tags import HostTimer, Tag, Timer, tagged

logger = init_logger("vllm.pie")

PROMPT_TOKENS = 256
"""Of a prompt chunk whose time is taken at start."""

_Mixed: Any = object  # What the mixin extends; vLLM's own classes are read as Any.


class PieWorkerMixin(_Mixed):
    """Sizes, allocates and drives the two tiers on one rank.

    Attributes:
        pie_device: kind of the device, a key of ``args.WORKERS``.
        pie_driver: name of the engine's driver.
        pie_granularity: bytes that the driver maps in one piece.
        pie_device_is_host: whether the device's KV memory is CPU memory too.
        pie_pool_has_tables: whether the device's memory holds page tables of the CPU pool.
    """

    pie_device: str
    pie_driver: str
    pie_granularity: int
    pie_device_is_host: bool
    pie_pool_has_tables: bool = False
    pie: PieCacheEngine | None = None
    _pie_geometry: Geometry
    _pie_prior: Prior
    _pie_tables = 0
    _pie_timer: Timer | None = None
    _pie_gather_below = 0
    _pie_warming_up = False
    _pie_gather_blocks = UNMEASURED_CTAS

    def pie_stream(self) -> int:
        """The stream that the model runs on; 0 is the calling thread."""
        return 0

    def pie_capturing(self) -> bool:
        """Whether what this thread submits now is captured in a graph."""
        return False

    def pie_timer(self) -> Timer:
        """Times a step from now on."""
        return HostTimer()

    @said_once
    def determine_available_memory(self) -> int:
        """The bytes of all blocks, pooled ones included: vLLM counts blocks by them."""
        (device_bytes,) = ranks.least_bytes(super().determine_available_memory())
        config = settings.of(self.vllm_config).config
        specs = self.get_kv_cache_spec()
        spec = refusals.check_specs(specs)
        number = self.vllm_config.parallel_config.tensor_parallel_size
        taken = number * device_bytes if self.pie_device_is_host else 0
        pool_bytes = ranks.share_of_pool(config.pool_gib, number, device_bytes, taken)
        device_bytes = self._pie_without_tables(device_bytes, pool_bytes)
        needed = self._pie_needed_blocks(spec.block_size)
        whole = whole_of(self.vllm_config)
        plan = partial(
            plan_geometry,
            num_layers=len(specs),
            page_bytes=spec.page_size_bytes,
            device_bytes=device_bytes,
            pool_bytes=pool_bytes,
            granularity=self.pie_granularity,
            needed_blocks=needed,
            ring_slots=config.ring_slots,
            whole_blocks=whole.blocks(spec.block_size) if whole else 0,
        )
        plan(ring_fraction=config.ring_fraction, fed_blocks=1)  # Refuses early what cannot work.
        row_bytes = len(specs) * spec.page_size_bytes
        requests = self._pie_requests(device_bytes // row_bytes, needed)
        prior = self._pie_prior = ranks.slowest(
            self._pie_measure(len(specs), spec.page_size_bytes, requests)
        )
        share, fed = config.ring_fraction, None
        if share is None:
            if prior.bandwidth is None:
                share = UNKNOWN_LINK_FRACTION
            elif prior.step_seconds is not None:
                fed = blocks_fed(prior.bandwidth, prior.step_seconds, row_bytes)
        geometry = self._pie_geometry = plan(ring_fraction=share, fed_blocks=fed)
        if whole:
            whole.check(geometry.resident_blocks, spec.block_size)
        logger.info(
            "Pie: %d resident blocks, %d pooled blocks, ring %d slots %.1f MiB (costs %.1f "
            "resident blocks), host pool up to %.2f GiB in %d rows%s, longest context served %d "
            "tokens, driver %s",
            geometry.resident_blocks,
            geometry.pooled_blocks,
            geometry.ring_slots,
            geometry.ring_bytes / 2**20,
            geometry.idle_cost_blocks,
            geometry.host_bytes / 2**30,
            geometry.rows,
            f" on each of {number} ranks" if number > 1 else "",
            min(
                self.vllm_config.model_config.max_model_len,
                (geometry.num_blocks - 1) * spec.block_size,
            ),
            self.pie_driver,
        )
        return geometry.num_blocks * geometry.row_bytes

    def _pie_without_tables(self, device_bytes: int, pool_bytes: int) -> int:
        """What is left for KV beside the page tables that a pool of this size may take.

        The driver takes them when memory is registered, while KV is in use: what was not kept for
        them would be missing then.

        Raises:
            ConfigError: nothing is left.
        """
        if not self.pie_pool_has_tables:
            return device_bytes
        tables = self._pie_tables = page_table_bytes(pool_bytes)
        logger.info(
            "Pie: %.1f MiB of the device's %.1f MiB for KV are kept for page tables of a CPU pool "
            "of %.2f GiB",
            tables / 2**20,
            device_bytes / 2**20,
            pool_bytes / 2**30,
        )
        return check_device_bytes(device_bytes - tables, tables, pool_bytes)

    def _pie_measure(self, num_layers: int, page_bytes: int, requests: int) -> Prior:
        """How fast the link is, and how long a step with so many requests takes.

        The link as the user said, as measured, or not known; the step where a target asks for it.
        """
        config = settings.of(self.vllm_config).config
        contention = config.limit_contention
        prior = Prior(
            limits_contention=not self.pie_device_is_host if contention is None else contention
        )
        if config.target_slowdown is not None:
            prior = self._pie_measure_steps(prior, requests)
        if config.link_gbps is not None:
            given = config.link_gbps * 1e9
            logger.info("Pie: link to the device counted on for %.2f GB/s", config.link_gbps)
            return prior._replace(bandwidth=given, most_bandwidth=given)
        try:
            link = measure_link(
                num_layers,
                page_bytes,
                granularity=self.pie_granularity,
                driver=self.pie_driver,
                link_bytes_per_s=config.emulated_link,
            )
        except TransferError as error:
            logger.warning("Pie: the link could not be measured at start: %s", error)
            return prior
        logger.info("Pie: link %s", link)
        self._pie_gather_below = link.gather_below
        self._pie_gather_blocks = link.gather_blocks
        return prior._replace(bandwidth=link.load)

    def _pie_measure_steps(self, prior: Prior, requests: int) -> Prior:
        """Seconds of a step of so many requests, of each of them, and of a prompt token."""
        one = model_runner.forward_seconds(self.model_runner, 1)
        step = model_runner.forward_seconds(self.model_runner, requests)
        by_request = max(step - one, 0.0) / max(requests - 1, 1)
        most = int(self.vllm_config.scheduler_config.max_num_batched_tokens)
        tokens = min(most, requests + PROMPT_TOKENS)
        by_token = by_request
        if tokens > requests:
            longer = model_runner.forward_seconds(self.model_runner, tokens) - step
            by_token = max(longer, 0.0) / (tokens - requests)
        logger.info(
            "Pie: %d requests decode in %.1f ms without attention, one in %.1f ms; a prompt token "
            "takes %.2f ms",
            requests,
            1e3 * step,
            1e3 * one,
            1e3 * by_token,
        )
        return prior._replace(
            step_seconds=step, request_seconds=by_request, prompt_seconds=by_token
        )

    def _pie_requests(self, device_blocks: int, longest: int) -> int:
        """Requests that run at once when each takes a quarter of the blocks of the longest one."""
        scheduler = self.vllm_config.scheduler_config
        return min(
            int(scheduler.max_num_seqs),
            int(scheduler.max_num_batched_tokens),
            max(1, device_blocks // max(1, longest // 4)),
        )

    def _pie_needed_blocks(self, block_size: int) -> int:
        """Blocks of one longest request; 1 where vLLM fits the length to the memory."""
        model = self.vllm_config.model_config
        if getattr(model, "original_max_model_len", None) == -1:
            return 1
        return cdiv(model.max_model_len, block_size)

    @said_once
    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Allocate arena and pool, give the runner its views, put up the gates."""
        config = settings.of(self.vllm_config).config
        self.pie = PieCacheEngine(
            config,
            self._pie_geometry,
            self.pie_driver,
            self._pie_gather_below,
            self._pie_gather_blocks,
            ranks.pool_board(),
        )
        shaped = self.pie.shape(kv_cache_config)
        with model_runner.own_allocation(self.model_runner, self.pie.allocate):
            super().initialize_from_config(shaped)
        if not self.pie.allocated:
            raise UnsupportedError(
                "vLLM did not take its KV memory from --block-manager pie; use "
                "--block-manager default."
            )
        context = self.vllm_config.compilation_config.static_forward_context
        layers = shaped.kv_cache_tensors[0].layers
        refusals.check_layers(layers, context, self.pie_device)
        self.pie.install_gates(layers, context)
        self.pie.install_in_runner(self.model_runner)

    @said_once
    def compile_or_warm_up_model(self) -> Any:
        """Warm up and capture graphs as vLLM does, then zero the ring."""
        if self.pie is None:
            return super().compile_or_warm_up_model()
        self._pie_warming_up = True
        try:
            with self.pie.warm_up(self.model_runner, self.pie_capturing, self.pie_stream):
                return super().compile_or_warm_up_model()
        finally:
            self._pie_warming_up = False

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a step with its plan; a ``StepReport`` travels back with the result.

        The plan is that of this ``scheduler_output``: two steps may be in flight. vLLM asks for
        the tokens of a step before it runs the next one.
        """
        assert self.pie is not None
        if not self._pie_warming_up:
            refusals.check_step(scheduler_output)
        orders: StepOrders | None = getattr(scheduler_output, "pie", None)
        plan = orders.plan if orders else None
        timer = self.pie_timer() if scheduler_output.total_num_scheduled_tokens else None
        several = self.vllm_config.parallel_config.world_size > 1
        try:
            with self.pie.step(plan, self.pie_stream()):
                output = super().execute_model(scheduler_output)
        except PieError as error:
            if several:
                end_rank(self.rank, error)
            raise
        if several and self.pie.failure is not None:
            end_rank(self.rank, self.pie.failure)  # vLLM hears of one rank's outputs only.
        if timer is not None:
            timer.stop()
        self._pie_timer = timer
        if orders is not None:
            self.pie.keeper.follow(orders.pool)
        return self._tag(output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample as vLLM does, and tag the result."""
        return self._tag(super().sample_tokens(grammar_output))

    def _tag(self, output: Any) -> Any:
        if self.pie is None:
            return output
        failure = "" if self.pie.failure is None else str(self.pie.failure)
        return tagged(output, Tag(self.pie.totals, self.pie.keeper.state, self._pie_timer, failure))

    def pie_geometry(self) -> Geometry:
        """The sizes, for the scheduler."""
        return self._pie_geometry

    def pie_prior(self) -> Prior:
        """What was measured at start, for the scheduler."""
        return self._pie_prior

    def pie_counters(self) -> dict[str, Any]:
        """Totals and sizes; see ``pie_vllm.vllm.counters``."""
        geometry = self._pie_geometry
        totals = self.pie.totals._asdict() if self.pie is not None else {}
        names = (
            "resident_blocks",
            "pooled_blocks",
            "ring_slots",
            "ring_bytes",
            "host_bytes",
            "device_bytes",
            "idle_cost_blocks",
            "page_bytes",
            "num_layers",
            "rows",
        )
        sizes = {name: getattr(geometry, name) for name in names}
        keeper = self.pie.keeper if self.pie is not None else None
        pool = {
            "pool_bytes": geometry.bytes_of_chunks(keeper.held) if keeper else 0,
            "pool_refused": keeper.refused if keeper else 0,
            "pool_table_bytes": self._pie_tables,
        }
        return {**totals, **sizes, **pool}

    def shutdown(self) -> None:
        """Shut down as vLLM does, then give arena and pool back."""
        try:
            super().shutdown()
        finally:
            if self.pie is not None:
                self.pie.close()
                self.pie = None
