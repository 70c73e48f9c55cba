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

from tests.helpers import cuda_on_cpu, failing_ranks, graphs_on_cpu, pool_faults, standin
from tests.helpers.engine_record import Recorder, copy_bytes
from tests.helpers.failing_engine import FailingCopies
from tests.helpers.process import resident_bytes
from tests.helpers.v2_on_cpu import enable


def _lose(runner: Any, relabels: Any) -> None:
    """In place of ``model_runner.relabel_rows``: the worker's tables keep the old ids."""


def _fuse_write(context: dict[str, Any], layer: int) -> None:
    """That layer writes its KV past its gate."""
    impl = list(context.values())[layer].impl
    impl.do_kv_cache_update = super(type(impl), impl).do_kv_cache_update


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
        self.recorder = Recorder(self.core.scheduler)
        self.failing = FailingCopies(self.core)
        self._encode = _encoder(Path(settings["llm"]["model"]))
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
        ahead = self.core.scheduler.kv_cache_manager.residency.parking.ahead_blocks
        return {
            "recomputed_tokens": found.recomputed_tokens,
            "hits": found.hits._asdict(),
            "ahead_blocks": ahead,
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
        names = [str(self._numbers + i) for i in range(len(requests))]
        self._numbers += len(requests)
        for name, request in zip(names, requests, strict=True):
            prompt = request["prompt"]
            tokens = self._encode(prompt) if isinstance(prompt, str) else prompt
            engine.add_request(
                name,
                {"prompt_token_ids": tokens},
                _params(request["params"]),
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
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.core, self.recorder, self.failing
        gc.unfreeze()  # vLLM froze its own objects.
        gc.collect()


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
        if "error" in result and engine is not None:
            engine.close()
            engine = None
        print(json.dumps(result), file=results, flush=True)


if __name__ == "__main__":
    main()
