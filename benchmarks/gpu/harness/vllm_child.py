"""One vLLM engine that does what its standard input asks, a line of JSON each.

    python -m benchmarks.gpu.harness.vllm_child SPEC.json

The first line of its answers says what it is. `do` is `load` (serve chats, figures), `chats` (the
same of chats that arrive or return), `answers` (tokens, logprobs and schedule), `add`, `prefill`,
`steps` and `abort` (decode steps one by one).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu.harness.chatting import serve_chats
from benchmarks.gpu.harness.context import end_with_parent
from benchmarks.harness.stats import percentile

MOVED = ("bytes_loaded", "bytes_stored", "stall_seconds", "graph_steps")
"""Pie's counters that grow while it works."""


def prompts_of(lengths: list[int], seed: int, vocabulary: int) -> list[list[int]]:
    """Prompts of random tokens, the same for every engine."""
    random_ = random.Random(seed)
    return [[random_.randrange(16, vocabulary) for _ in range(n)] for n in lengths]


class Child:
    """The engine and what can be asked of it."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from vllm import LLM

        import pie_vllm

        self._pie = spec["pie"] is not None
        more = pie_vllm.engine_args(**spec["pie"]) if self._pie else {}
        settings = {"skip_tokenizer_init": True, "generation_config": "vllm", **spec["llm"]}
        begin = time.perf_counter()
        self.llm = LLM(**settings, **more, disable_log_stats=False)
        self.engine: Any = self.llm.llm_engine
        self.seconds = time.perf_counter() - begin
        self._vocabulary = int(self.engine.vllm_config.model_config.get_vocab_size())
        self._names = 0
        self._modes: Counter[str] = Counter()
        self._schedule: list[list[int]] = []
        self._watch()
        if spec.get("warm_up"):
            self.load(spec["warm_up"], tokens=16, seed=-1)

    def _core(self) -> Any:
        """The engine core, where it is in this process."""
        return getattr(self.engine.engine_core, "engine_core", None)

    def _watch(self) -> None:
        """Note what is scheduled, and in which mode graphs run; in one process only."""
        core = self._core()
        if core is None:
            return
        scheduler = core.scheduler
        schedule, update = scheduler.schedule, scheduler.update_from_output
        numbers: dict[str, int] = {}

        def scheduled(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            tokens = output.num_scheduled_tokens
            self._schedule.append(
                [n for r, c in tokens.items() for n in (numbers.setdefault(r, len(numbers)), c)]
            )
            return output

        def updated(scheduler_output: Any, runner_output: Any, *args: Any, **kwargs: Any) -> Any:
            stats = getattr(runner_output, "cudagraph_stats", None)
            if stats is not None:
                self._modes[str(stats.runtime_mode)] += 1
            return update(scheduler_output, runner_output, *args, **kwargs)

        scheduler.schedule, scheduler.update_from_output = scheduled, updated

    def about(self) -> dict[str, Any]:
        """Sizes and modes."""
        config = self.engine.vllm_config
        layers = config.compilation_config.static_forward_context.values()
        backends = {
            layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")
        }
        mode = config.compilation_config.cudagraph_mode
        return {
            "start_seconds": self.seconds,
            "num_blocks": config.cache_config.num_gpu_blocks,
            "block_size": config.cache_config.block_size,
            "runner": "v2" if config.use_v2_model_runner else "v1",
            "backends": sorted(backends),
            "cudagraph_mode": getattr(mode, "name", str(mode)),
            "async": bool(config.scheduler_config.async_scheduling),
            "pie": self.pie(),
        }

    def pie(self) -> dict[str, Any]:
        """Pie's counters; none for stock."""
        if not self._pie:
            return {}
        from pie_vllm.vllm import counters

        found: dict[str, Any] = counters(self.llm)
        return found

    def metric(self, name: str) -> int:
        """A counter of vLLM's."""
        return sum(int(m.value) for m in self.llm.get_metrics() if m.name == name)

    def add(self, lengths: list[int], tokens: int, seed: int, logprobs: int | None = None) -> int:
        """Add greedy requests; returns how many."""
        from vllm import SamplingParams

        for prompt in prompts_of(lengths, seed, self._vocabulary):
            params = SamplingParams(
                temperature=0.0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                logprobs=logprobs,
            )
            self.engine.add_request(str(self._names), {"prompt_token_ids": prompt}, params)
            self._names += 1
        return len(lengths)

    def load(self, lengths: list[int], tokens: int, seed: int) -> dict[str, Any]:
        """Serve chats that all come at once; throughput, times, preemptions, what pie moved."""
        first = self._names
        before, preempted = self.pie(), self.metric("vllm:num_preemptions")
        self.add(lengths, tokens, seed)
        times: list[list[float]] = [[] for _ in lengths]
        counts = [0] * len(lengths)
        begin = time.perf_counter()
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now = time.perf_counter() - begin
            for output in outputs:
                chat = int(output.request_id) - first
                counts[chat] = len(output.outputs[0].token_ids)
                times[chat].append(now)
        seconds = time.perf_counter() - begin
        after = self.pie()
        moved: dict[str, Any] = {
            key: after[key] - before[key]
            for key in (*MOVED, "load_seconds", "steps")
            if key in after
        }
        ttft = [chat[0] for chat in times]
        # Some outputs carry two tokens where the front end is behind: per token all the same.
        tpot = [(chat[-1] - chat[0]) / max(n - 1, 1) for chat, n in zip(times, counts, strict=True)]
        gaps = [b - a for chat in times for a, b in itertools.pairwise(chat)]
        figures: dict[str, Any] = {"tok_s": sum(counts) / seconds, "seconds": seconds}
        for name, values in (("ttft", ttft), ("tpot", tpot), ("itl", gaps)):
            figures[f"{name}_p50_ms"] = 1e3 * percentile(values, 50)
            figures[f"{name}_p99_ms"] = 1e3 * percentile(values, 99)
        figures["preemptions"] = self.metric("vllm:num_preemptions") - preempted
        return {**figures, **moved, "pooled_peak": after.get("pooled_peak", 0)}

    def chats(self, load: dict[str, Any]) -> dict[str, Any]:
        """See `chatting.serve_chats`; in one process only."""
        return serve_chats(self.llm, load, self._pie)

    def answers(self, lengths: list[int], tokens: int, seed: int, logprobs: int) -> dict[str, Any]:
        """Tokens and logprobs of requests that are all added before the first step."""
        first = self._names
        self._schedule.clear()
        before = self.pie()
        self.add(lengths, tokens, seed, logprobs)
        found: dict[int, Any] = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                one = output.outputs[0]
                found[int(output.request_id) - first] = {
                    "tokens": list(one.token_ids),
                    "logprobs": [
                        sorted((token, value.logprob) for token, value in position.items())
                        for position in one.logprobs or ()
                    ],
                }
        after = self.pie()
        # Requests are numbered as they appear, those before not counted.
        numbers: dict[int, int] = {}
        schedule = [
            [
                n
                for r, c in zip(step[::2], step[1::2], strict=True)
                for n in (numbers.setdefault(r, len(numbers)), c)
            ]
            for step in self._schedule
            if step
        ]
        return {
            "answers": [found[i] for i in range(len(lengths))],
            "schedule": schedule,
            "moved": {k: after[k] - before[k] for k in ("bytes_loaded", "bytes_stored") if after},
            "pooled_peak": after.get("pooled_peak", 0),
            "gates": after.get("gates", 0) - before.get("gates", 0),
            "graph_steps": after.get("graph_steps", 0) - before.get("graph_steps", 0),
        }

    def prefill(self, requests: int) -> int:
        """Step until so many requests have answered, at most; returns the steps."""
        seen: set[str] = set()
        steps = 0
        while len(seen) < requests and steps < 100 * requests:
            seen |= {output.request_id for output in self.engine.step()}
            steps += 1
        return steps

    def steps(self, count: int) -> dict[str, Any]:
        """So many steps that answer something; seconds and answers of each, and graph modes."""
        self._modes.clear()
        before = self.pie()
        found: list[tuple[float, int]] = []
        begin = time.perf_counter()
        while len(found) < count and self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            if not outputs:
                continue
            now = time.perf_counter()
            found.append((now - begin, len(outputs)))
            begin = now
        self._settle()
        after = self.pie()
        moved = {key: after[key] - before[key] for key in MOVED if key in after}
        planned = after.get("steps", 0) - before.get("steps", 0)
        return {"steps": found, "modes": dict(self._modes), "steps_with_plan": planned, **moved}

    def _settle(self) -> None:
        """Wait for work that is under way, so that it does not run in another engine's turn."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def abort(self) -> int:
        """Take all requests away."""
        self.engine.abort_request([str(name) for name in range(self._names)])
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return self._names

    def close(self) -> None:
        """Shut down."""
        self.engine.engine_core.shutdown()


def main() -> None:
    """Answer until the input ends."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What vLLM prints goes to the log.

    def say(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    try:
        child = Child(json.loads(Path(sys.argv[1]).read_text()))
        say({"answer": child.about()})
    except BaseException as error:
        traceback.print_exc()
        say({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            say({"answer": getattr(child, ask.pop("do"))(**ask)})
        except BaseException as error:
            traceback.print_exc()
            say({"error": f"{type(error).__name__}: {error}"})
            break
    child.close()


if __name__ == "__main__":
    main()
