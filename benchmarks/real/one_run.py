"""One configuration, one engine, this process: run the load once and write what it showed.

`benchmarks.throughput` starts this module once per run, so that every run has a fresh process:

    python -m benchmarks.real.one_run SPEC.json RESULT.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.load import Load
from benchmarks.real.in_process import scheduler_of
from benchmarks.real.step_times import watch_steps
from benchmarks.real.token_gaps import gap_figures, watch_pooled

WARM_UP = Load(chats=2, tokens=16)


def make_llm(spec: dict[str, Any]) -> Any:
    """The engine of a spec, once it has answered a few tokens."""
    from vllm import LLM

    import pie_vllm

    more = {} if spec["pie"] is None else pie_vllm.engine_args(**spec["pie"])
    llm = LLM(**spec["llm"], **more, disable_log_stats=False)
    add_chats(llm, WARM_UP)
    run_steps(llm, WARM_UP)
    return llm


def add_chats(llm: Any, load: Load, longer: Sequence[int] = ()) -> list[int]:
    """Add all chats of `load` before the first step: with that, vLLM is deterministic.

    The first chats may be `longer` by some tokens each. Returns the tokens of each prompt.
    """
    from vllm import SamplingParams

    tokenizer = llm.get_tokenizer()
    prompts = []
    for index, prompt in enumerate(load.prompts()):
        tokens = load.tokens + sum(longer[index : index + 1])
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": ids}, sampling)
        prompts.append(len(ids))
    return prompts


class Steps(NamedTuple):
    """What a load showed.

    Attributes:
        seconds: time of the whole load.
        times: times of each chat's outputs, in seconds.
        pooled: for each of them, whether the chat had pooled blocks when it was made.
        tokens: ids of each chat's tokens.
    """

    seconds: float
    times: list[list[float]]
    pooled: list[list[bool]]
    tokens: list[list[int]]


def run_steps(llm: Any, load: Load, pooled: Collection[str] = ()) -> Steps:
    """Step until all chats are done; `pooled` has, after each step, the chats with pooled KV."""
    times: list[list[float]] = [[] for _ in range(load.chats)]
    held: list[list[bool]] = [[] for _ in range(load.chats)]
    tokens: list[list[int]] = [[] for _ in range(load.chats)]
    begin = time.perf_counter()
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
        now = time.perf_counter() - begin
        for output in outputs:
            chat = int(output.request_id)
            times[chat].append(now)
            held[chat].append(output.request_id in pooled)
            tokens[chat] = list(output.outputs[0].token_ids)
    return Steps(time.perf_counter() - begin, times, held, tokens)


def preemptions(llm: Any) -> int:
    """Preemptions that the engine has counted since it started."""
    counters = [m for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    return sum(int(counter.value) for counter in counters)


def pie_counters(llm: Any) -> dict[str, float]:
    """The counters of pie_vllm, with its geometry."""
    from pie_vllm.vllm import counters

    found: dict[str, float] = counters(llm)
    return found


def main() -> None:
    """Run the spec of the first file and write the result to the second."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    load = Load(**spec["load"])
    llm = make_llm(spec)
    before = preemptions(llm)
    pie_before = pie_counters(llm) if spec["pie"] is not None else {}

    pooled = watch_pooled(llm) if spec["pie"] is not None else ()

    prompts = add_chats(llm, load)
    watched = watch_steps(llm) if spec.get("watch_steps") else None
    steps = run_steps(llm, load, pooled)

    result: dict[str, Any] = {
        "tok_s": sum(map(len, steps.tokens)) / steps.seconds,
        "seconds": steps.seconds,
        **gap_figures(steps.times, steps.pooled),
        "preemptions": preemptions(llm) - before,
        "num_blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
        "tokens_per_step": sum(map(len, steps.tokens)) / sum(map(len, steps.times)),
        "tokens": steps.tokens,
    }
    if watched is not None:
        limits = llm.llm_engine.vllm_config.scheduler_config
        result["trace"] = {
            "steps": watched,
            "prompts": prompts,
            "max_running": limits.max_num_seqs,
            "max_tokens": limits.max_num_batched_tokens,
        }
    if spec["pie"] is not None:
        result["pie_before"] = pie_before
        result["pie"] = pie_counters(llm)
        detector = scheduler_of(llm).pie_controller.decider.detector
        result["streaming_seconds"] = detector.streaming_seconds
        result["slowed_seconds"] = detector.slowed_seconds
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
