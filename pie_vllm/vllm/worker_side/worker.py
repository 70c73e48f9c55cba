"""vLLM's workers with the pie cache engine in place of their KV allocation."""

from __future__ import annotations

from functools import partial
from typing import Any

from vllm.logger import init_logger

from pie_vllm.errors import PieError, UnsupportedError
from pie_vllm.geometry import Geometry, cdiv
from pie_vllm.plan import Prior, StepOrders
from pie_vllm.sizing import (
    UNKNOWN_LINK_FRACTION,
    blocks_fed,
    check_device_bytes,
    page_table_bytes,
    plan_geometry,
)
from pie_vllm.vllm import draft_refusals, layer_refusals, refusals, settings
from pie_vllm.vllm.compat import drafters, grouping, model_runner
from pie_vllm.vllm.kv_groups import KvGroups, groups_of
from pie_vllm.vllm.speculation import check_residents, written_blocks
from pie_vllm.vllm.whole import whole_of
from pie_vllm.vllm.worker_side import kv_layout, ranks
from pie_vllm.vllm.worker_side.cache_engine import PieCacheEngine
from pie_vllm.vllm.worker_side.failures import end_rank, said_once
from pie_vllm.vllm.worker_side.output_tags import HostTimer, Tag, Timer, tagged
from pie_vllm.vllm.worker_side.start_measurements import (
    Measured,
    with_attention,
    with_link,
    with_step_times,
)
from pie_vllm.vllm.worker_side.step_board import StepBoard

logger = init_logger("vllm.pie")

_Mixed: Any = object  # What the mixin extends; vLLM's own classes are read as Any.


class PieWorkerMixin(_Mixed):
    """Sizes, allocates and drives the two tiers on one rank.

    Attributes:
        pie_device: kind of the device, a key of ``args.WORKERS``.
        pie_driver: name of the transfer engine's driver.
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
    _pie_groups: KvGroups
    _pie_prior: Prior
    _pie_measured: Measured
    _pie_tables = 0
    _pie_timer: Timer | None = None
    _pie_step_board: StepBoard | None = None
    _pie_step: int | None = None
    _pie_warming_up = False

    def pie_stream(self) -> int:
        """The stream that the model runs on; 0 is the calling thread."""
        return 0

    def pie_capturing(self) -> bool:
        """Whether what this thread submits now is captured in a graph."""
        return False

    def pie_timer(self) -> Timer:
        """A timer of the step that begins now."""
        return HostTimer()

    @said_once
    def determine_available_memory(self) -> int:
        """Bytes of all blocks, pooled ones included: vLLM counts blocks by them.

        Raises:
            ConfigError: the settings do not fit the memory.
            UnsupportedError: the model's KV is of a kind that pie cannot pool.
        """
        (device_bytes,) = ranks.least_bytes(super().determine_available_memory())
        geometry = self._pie_geometry = self._pie_size(device_bytes)
        return geometry.num_blocks * geometry.block_bytes

    def _pie_size(self, device_bytes: int) -> Geometry:
        """Sizes of both tiers and of the ring, equal on all ranks.

        Args:
            device_bytes: bytes for KV on each rank's device.
        """
        config = settings.of(self.vllm_config).config
        specs = self.get_kv_cache_spec()
        found = grouping.groups_by_vllm(self.vllm_config, specs)
        drafts = drafters.draft_layers(self.model_runner, self.vllm_config.speculative_config)
        draft_refusals.check_groups(found, drafts)
        groups = self._pie_groups = groups_of(found, specs, self.vllm_config, drafts)
        number = self.vllm_config.parallel_config.tensor_parallel_size
        taken = number * device_bytes if self.pie_device_is_host else 0
        pool_bytes = ranks.share_of_pool(config.pool_gib, number, device_bytes, taken)
        device_bytes = self._pie_without_tables(device_bytes, pool_bytes)
        num_layers, page_bytes, size = len(groups.layers), groups.page_bytes, groups.block_size
        needed = self._pie_needed_blocks(size) + groups.residents
        whole = whole_of(self.vllm_config)
        plan = partial(
            plan_geometry,
            num_layers=num_layers,
            extra_regions=groups.extra_regions,
            draft_layers=len(groups.drafts),
            page_bytes=page_bytes,
            device_bytes=device_bytes,
            pool_bytes=pool_bytes,
            granularity=self.pie_granularity,
            needed_blocks=needed,
            ring_slots=config.ring_slots,
            whole_blocks=max(
                whole.blocks(size) if whole else 0,
                groups.resident_min,
                written_blocks(self.vllm_config, size),
            ),
        )
        plan(ring_fraction=config.ring_fraction, fed_blocks=1)  # Refuses early what cannot work.
        row_bytes = num_layers * page_bytes
        device_blocks = device_bytes // (groups.regions * page_bytes)
        requests = self._pie_requests(device_blocks, needed)
        kv_bytes = min(device_blocks, requests * needed) * row_bytes
        prior = self._pie_prior = ranks.slowest(
            self._pie_measure(num_layers, page_bytes, requests, kv_bytes)
        )
        fraction, fed = config.ring_fraction, None
        if fraction is None:
            if prior.bandwidth is None:
                fraction = UNKNOWN_LINK_FRACTION
            elif prior.full_step_seconds is not None:
                fed = blocks_fed(prior.bandwidth, prior.full_step_seconds, row_bytes)
        geometry: Geometry = plan(
            ring_fraction=fraction, fed_blocks=fed, link_bytes_per_s=prior.bandwidth
        )
        if whole:
            whole.check(geometry.resident_blocks, size)
        groups.check(geometry.resident_blocks)
        check_residents(self.vllm_config, geometry.resident_blocks, size)
        self._pie_log_sizes(geometry, groups)
        return geometry

    def _pie_log_sizes(self, geometry: Geometry, groups: KvGroups) -> None:
        longest = self.vllm_config.model_config.max_model_len
        number = self.vllm_config.parallel_config.tensor_parallel_size
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
            min(longest, (geometry.num_blocks - 1 - groups.residents) * groups.block_size),
            self.pie_driver,
        )
        if groups.drafts:
            logger.info(
                "Pie: %d layers of the drafter keep their KV of all blocks on the device; that of "
                "pooled blocks takes %.1f MiB of it",
                geometry.draft_layers,
                geometry.draft_bytes / 2**20,
            )
        if groups.others:
            logger.info(
                "Pie: %d layers of full attention are pooled, %.0f %% of the blocks of a request "
                "of --max-model-len; windows, chunks and states in %d other groups stay on the "
                "device, up to %d blocks a request. %s",
                len(groups.layers),
                100 * groups.pooled_share(longest),
                len(groups.others),
                groups.residents,
                "Those of preempted requests are parked."
                if groups.parks
                else "Preempted requests are computed again: rows of the pool do not hold all "
                "pages of these blocks.",
            )

    def _pie_without_tables(self, device_bytes: int, pool_bytes: int) -> int:
        """Bytes left for KV beside the page tables that a pool of this size may take.

        The driver takes them when memory is registered, while KV is in use, so they are kept free
        from the start.

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

    def _pie_measure(self, num_layers: int, page_bytes: int, requests: int, kv_bytes: int) -> Prior:
        """How fast the link is and, where a target asks for it, how long a step takes.

        Args:
            num_layers: number of layers with KV.
            page_bytes: bytes of a block in one layer.
            requests: number of requests in the step that is timed.
            kv_bytes: bytes of KV that these requests hold on a full device.
        """
        config = settings.of(self.vllm_config).config
        contention = config.limit_contention
        prior = Prior(
            limits_contention=not self.pie_device_is_host if contention is None else contention
        )
        if config.target_slowdown is not None:
            tokens_max = int(self.vllm_config.scheduler_config.max_num_batched_tokens)
            each = 1 + int(self.vllm_config.num_speculative_tokens)
            prior = with_step_times(prior, self.model_runner, requests, tokens_max, each)
            prior = with_attention(prior, self.model_runner.device, kv_bytes)
        measured = self._pie_measured = with_link(
            prior,
            config,
            num_layers=num_layers,
            page_bytes=page_bytes,
            granularity=self.pie_granularity,
            driver=self.pie_driver,
        )
        return measured.prior

    def _pie_requests(self, device_blocks: int, longest: int) -> int:
        """Number of requests at once, each with a quarter of the blocks of the longest one."""
        scheduler = self.vllm_config.scheduler_config
        return min(
            int(scheduler.max_num_seqs),
            int(scheduler.max_num_batched_tokens),
            max(1, device_blocks // max(1, longest // 4)),
        )

    def _pie_needed_blocks(self, block_size: int) -> int:
        """Number of blocks of the longest request; 1 where vLLM fits the length to the memory."""
        model = self.vllm_config.model_config
        if getattr(model, "original_max_model_len", None) == -1:
            return 1
        return cdiv(model.max_model_len, block_size)

    @said_once
    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Allocate arena and pool, give the runner its views, put up the gates."""
        config = settings.of(self.vllm_config).config
        groups = self._pie_groups
        self._pie_check_groups(kv_cache_config)
        first_chunks = settings.first_chunks(
            self.vllm_config, self._pie_geometry, groups.block_size
        )
        self.pie = PieCacheEngine(
            config,
            self._pie_geometry,
            self.pie_driver,
            self._pie_measured.gather_below,
            self._pie_measured.gather_blocks,
            ranks.pool_board(first_chunks),
            first_chunks,
        )
        self._pie_step_board = ranks.step_board()
        shaped = kv_layout.over_arena(
            kv_cache_config, self._pie_geometry, (*groups.layers, *groups.drafts)
        )
        with model_runner.own_allocation(self.model_runner, self.pie.allocate):
            super().initialize_from_config(shaped)
        if not self.pie.allocated:
            raise UnsupportedError(
                "vLLM did not take its KV memory from --block-manager pie; use "
                "--block-manager default."
            )
        context = self.vllm_config.compilation_config.static_forward_context
        layer_refusals.check_layers(groups.layers, context, self.pie_device)
        self.pie.install_gates(groups.layers, context)
        self.pie.install_in_runner(self.model_runner, groups.pooled)

    def _pie_check_groups(self, kv_cache_config: Any) -> None:
        """Check that vLLM grouped the layers as it was expected to, by which all is sized.

        Raises:
            UnsupportedError: it did otherwise.
        """
        made = [set(group.layer_names) for group in kv_cache_config.kv_cache_groups]
        groups = self._pie_groups
        sizes = max(map(len, made), default=0), len(made)
        own = {*groups.layers, *groups.drafts}
        if sizes != (groups.regions, len(groups.others) + 1) or made[groups.pooled] != own:
            raise UnsupportedError(
                f"vLLM made {sizes[1]} KV cache groups of up to {sizes[0]} layers, where "
                f"--block-manager pie expected {len(groups.others) + 1} of up to "
                f"{groups.regions}. Use --block-manager default."
            )

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

        Two steps may be in flight, so the plan comes with this very ``scheduler_output``. vLLM asks
        for the tokens of a step before it runs the next one.
        """
        assert self.pie is not None
        if not self._pie_warming_up:
            refusals.check_step(scheduler_output)
        orders: StepOrders | None = getattr(scheduler_output, "pie", None)
        plan = orders.plan if orders else None
        timer = self.pie_timer() if scheduler_output.total_num_scheduled_tokens else None
        try:
            with self.pie.step(plan, self.pie_stream()):
                output = super().execute_model(scheduler_output)
        except PieError as error:
            if self.vllm_config.parallel_config.world_size > 1:
                end_rank(self.rank, error)
            raise
        self._pie_step = plan.step if plan else None
        if self._pie_step_board is not None and plan is not None:
            self._pie_step_board.post(plan.step, self._pie_failure())
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
        board, step, elsewhere = self._pie_step_board, self._pie_step, None
        if board is not None and board.leads and step is not None:
            elsewhere = partial(board.failure, step)
        pool = self.pie.keeper.state
        failure = self._pie_failure()
        return tagged(output, Tag(self.pie.totals, pool, self._pie_timer, failure, elsewhere))

    def _pie_failure(self) -> str:
        """Error text of the newest step's first failed copy on this rank; empty if none failed."""
        failure = None if self.pie is None else self.pie.failure
        return "" if failure is None else str(failure) or type(failure).__name__

    def pie_geometry(self) -> Geometry:
        """The sizes, for the scheduler."""
        return self._pie_geometry

    def pie_prior(self) -> Prior:
        """Link and step times as measured at start, for the scheduler."""
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
            "draft_layers",
            "draft_bytes",
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
