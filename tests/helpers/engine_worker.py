"""Runs engines in a process of its own: one job a line in, one result a line out.

Everything happens in this process and all requests of a round are added before
its first step, so vLLM is deterministic here.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tests.helpers import (
    cuda_on_cpu,
    failing_ranks,
    fp8_on_cpu,
    graphs_on_cpu,
    mla_on_cpu,
    pool_faults,
    standin,
)
from tests.helpers.drafts import hasty_blocks
from tests.helpers.engine_inputs import blind_keys, input_of, lora_of
from tests.helpers.engine_record import Recorder, copy_bytes
from tests.helpers.failing_engine import FailingCopies
from tests.helpers.process import resident_bytes
from tests.helpers.v2_on_cpu import enable

_freeze = gc.freeze


def _set_aside() -> None:
    """Free what an engine left; what is still there then, modules above all, stays for good.

    vLLM collects garbage several times in each start. Among all modules that takes as long as the
    rest of a small engine's start, so vLLM finds them frozen, and freezes nothing of its own, which
    is to be freed when the engine closes.
    """
    gc.collect()
    _freeze()
    gc.freeze = gc.unfreeze = lambda: None


def _leave_ranks() -> None:
    """Give back what an engine that did not start made of this process: its ranks' groups."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    _set_aside()


def import_vllm() -> None:
    """Import what engines need, and have vLLM look at a model's class in this process.

    It starts another, which imports everything again, so that CUDA is not initialised here.
    """
    import vllm.v1.worker.cpu_worker
    from vllm.model_executor.models import registry

    assert vllm
    registry._run_in_subprocess = lambda look: look()
    _register_kernels_once()


def _register_kernels_once() -> None:
    """Have vLLM register its kernels for CPUs once in this process, not in each start.

    It looks for them in all modules that are there, and cannot look at one of llvmlite's, which
    n-gram speculation imports: ``_rebind_kernels``, triton_utils/dispatcher.py:139 in 0.32.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    register = cache(platform.register_triton_kernel_overrides)
    platform.register_triton_kernel_overrides = staticmethod(register)


def _lose_beside(tails: Any) -> None:
    """Have windows and states of requests that come back hold what their pages held before."""
    restore = tails.restore

    def restored(block: Any, resident: int) -> None:
        if block.group is None:
            restore(block, resident)

    tails.restore = restored


def _lose(runner: Any, relabels: Any, group: int) -> None:
    """In place of ``model_runner.relabel_rows``: the worker's tables keep the old ids."""


def _fuse_write(context: dict[str, Any], layer: int) -> None:
    """That layer writes its KV past its gate."""
    attention = [found for found in context.values() if hasattr(found, "attn_backend")][layer]
    if attention.attn_backend.is_mla():
        del attention.update_kv_cache
        return
    impl = attention.impl
    impl.do_kv_cache_update = super(type(impl), impl).do_kv_cache_update


def _lose_orders(residency: Any) -> None:
    """Its plans have neither ``stores_first`` nor ``after_all``."""
    end_step = residency.end_step

    def without_orders(*args: Any, **kwargs: Any) -> Any:
        plan = end_step(*args, **kwargs)
        return plan and plan._replace(stores_first=False, after_all=False)

    residency.end_step = without_orders


class Engine:
    """One ``vllm.LLM`` and a record of what it schedules."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import LLM

        import pie_vllm
        from pie_vllm.vllm.compat import model_runner

        self.settings = settings
        self._relabel = model_runner.relabel_rows
        if settings["lost_relabels"]:
            model_runner.relabel_rows = _lose
        if settings["llm"].get("kv_cache_dtype", "auto") != "auto":
            fp8_on_cpu.enable()
        more = {} if settings["pie"] is None else pie_vllm.engine_args(**settings["pie"])
        began = time.process_time()
        try:
            self.llm = LLM(**{"disable_log_stats": True, **settings["llm"]}, **more)
        except BaseException:
            model_runner.relabel_rows = self._relabel
            raise
        self.start_seconds = time.process_time() - began
        self.core = self.llm.llm_engine.engine_core.engine_core
        if settings.get("fused_write") is not None:
            context = self.core.vllm_config.compilation_config.static_forward_context
            _fuse_write(context, settings["fused_write"])
        if settings.get("lost_orders"):
            _lose_orders(self.core.scheduler.kv_cache_manager.residency)
        self._see_keys = blind_keys() if settings.get("blind_keys") else None
        if settings.get("lost_beside"):
            _lose_beside(self.core.scheduler.kv_cache_manager.residency.parking.tails)
        self._wait_for_drafts = hasty_blocks() if settings.get("hasty_blocks") else None
        self.recorder = Recorder(self.core.scheduler)
        self.failing = FailingCopies(self.core)
        self._model = Path(settings["llm"]["model"])
        self._numbers = 0

    def counters(self) -> dict[str, Any]:
        """Pie's counters, or nothing."""
        if self.settings["pie"] is None:
            return {}
        from pie_vllm.vllm import counters

        found: dict[str, Any] = counters(self.llm)
        return found

    def turns_left_out(self) -> int:
        """Requests left out of steps so far."""
        controller = getattr(self.core.scheduler, "pie_controller", None)
        return controller.turns.left_out if controller else 0

    def admissions(self) -> dict[str, Any]:
        """What pie's requests found in the prefix cache and computed again, so far."""
        found = getattr(self.core.scheduler.kv_cache_manager, "hit_counts", None)
        if found is None:
            return {}
        parking = self.core.scheduler.kv_cache_manager.residency.parking
        return {
            "recomputed_tokens": found.recomputed_tokens,
            "hits": found.hits._asdict(),
            "ahead_blocks": parking.ahead_blocks,
            "restored_blocks": parking.restored_blocks,
        }

    def metrics(self) -> dict[str, float]:
        """vLLM's metrics that are one number, where they are on."""
        if self.settings["llm"].get("disable_log_stats", True):
            return {}
        found = self.llm.get_metrics()
        return {metric.name: metric.value for metric in found if hasattr(metric, "value")}

    def run(self, round_: dict[str, Any]) -> dict[str, Any]:
        """Answer the requests of a round; see ``Round`` in tests/helpers/engine.py."""
        import vllm

        if round_.get("fail"):
            standin.load().fail(*round_["fail"])
        if round_["reset_prefix_cache"]:
            assert self.llm.reset_prefix_cache()
        self.failing.order(round_.get("failing", []))
        requests = round_["requests"]
        engine = self.llm.llm_engine
        if round_["idle"]:
            self.recorder.start()
            engine.step()  # As an engine process does, to tell the workers who is done.
            time.sleep(round_["idle"])
        if round_.get("late") and self.settings["pie"]:
            self._late(round_["late"])
        before, began = self.counters(), time.process_time()
        began_with = resident_bytes()
        record = self.recorder.start()
        self.recorder.replay(round_.get("replay"))
        names = [str(self._numbers + i) for i in range(len(requests))]
        self._numbers += len(requests)
        for name, request in zip(names, requests, strict=True):
            prompt = request["prompt"]
            tokens = _encoder(self._model)(prompt) if isinstance(prompt, str) else prompt
            engine.add_request(
                name,
                input_of(engine, tokens, request),
                _params(request["params"]),
                lora_request=lora_of(request),
                priority=request["priority"],
            )
        done: dict[str, Any] = {}
        steps = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    done[output.request_id] = _answer(output)
            steps += 1
            gone = [n for n, r in zip(names, requests, strict=True) if r["abort_at"] == steps]
            engine.abort_request([name for name in gone if name not in done])
        after, plans = self.counters(), record.pop("plans")
        moved = {
            name: after[name] - before[name]
            for name in ("bytes_loaded", "bytes_stored", "gates", "steps")
            if name in after
        }
        return {
            "answers": [done.get(name) for name in names],
            "steps": steps,
            "seconds": time.process_time() - began,
            "moved": moved,
            "pool_bytes_before": before.get("pool_bytes", 0),
            "resident_bytes": (began_with, resident_bytes()),
            "counters": after,
            "metrics": self.metrics(),
            "left_out": self.turns_left_out(),
            "vllm": vllm.__version__,
            "groups": self.recorder.groups(),
            "failed": self.failing.failed(),
            "v2_runner": self.core.vllm_config.use_v2_model_runner,
            "most_in_flight": self.core.batch_queue_size,
            "cuda": cuda_on_cpu.report() if cuda_on_cpu.enabled() else None,
            **self.admissions(),
            **record,
            **copy_bytes(plans, after),
        }

    def _late(self, seconds: float) -> None:
        """The worker gets to its next step so much later."""
        worker = self.core.model_executor.driver_worker.worker
        run = worker.execute_model

        def late(*args: Any, **kwargs: Any) -> Any:
            worker.execute_model = run
            time.sleep(seconds)
            return run(*args, **kwargs)

        worker.execute_model = late

    def close(self) -> None:
        """Give everything back, so that the next engine can start in this process."""
        from pie_vllm.vllm.compat import model_runner

        model_runner.relabel_rows = self._relabel
        if self._see_keys is not None:
            self._see_keys()
        if self._wait_for_drafts is not None:
            self._wait_for_drafts()
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.core, self.recorder, self.failing
        _set_aside()


@cache
def _encoder(model: Path) -> Callable[[str], list[int]]:
    """Text to tokens; vLLM's own tokenizers take longer to start than the model."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return lambda text: list(tokenizer.encode(text).ids)


def _params(params: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    params = dict(params)
    if "structured" in params:
        params["structured_outputs"] = StructuredOutputsParams(**params.pop("structured"))
    return SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **params)


def _logprobs(positions: Any) -> Any:
    """Top logprobs of each position, with the full precision of a float."""
    if positions is None:
        return None
    return [
        None if p is None else [[token, value.logprob, value.rank] for token, value in p.items()]
        for p in positions
    ]


def _answer(output: Any) -> dict[str, Any]:
    return {
        "tokens": [list(one.token_ids) for one in output.outputs],
        "texts": [one.text for one in output.outputs],
        "logprobs": [_logprobs(one.logprobs) for one in output.outputs],
        "prompt_logprobs": _logprobs(output.prompt_logprobs),
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": output.num_cached_tokens,
    }


def main() -> None:
    """Answer jobs until standard input ends. An error is an answer and ends the engine."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    enable()
    cuda_on_cpu.enable()
    graphs_on_cpu.enable()
    pool_faults.enable()
    failing_ranks.enable()
    mla_on_cpu.enable()
    import_vllm()
    _set_aside()
    engine: Engine | None = None
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if engine is None or engine.settings != job["engine"]:
                if engine is not None:
                    engine.close()
                    engine = None
                engine = Engine(job["engine"])
            result: dict[str, Any] = {
                "rounds": [engine.run(round_) for round_ in job["rounds"]],
                "start_seconds": engine.start_seconds,
            }
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        if "error" in result:
            if engine is not None:
                engine.close()
                engine = None
            else:
                _leave_ranks()
        print(json.dumps(result), file=results, flush=True)


if __name__ == "__main__":
    main()
