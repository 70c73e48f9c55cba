"""One configuration, one engine, this process: run the load once and write what it showed.

`benchmarks.throughput` starts this module once per run, so that every run has a fresh process:

    python -m benchmarks.harness.one_run SPEC.json RESULT.json
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.load import Load
from benchmarks.harness.stats import percentile

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


def add_chats(llm: Any, load: Load, longer: Sequence[int] = ()) -> None:
    """Add all chats of `load` before the first step: with that, vLLM is deterministic.

    The first chats may be `longer` by some tokens each.
    """
    from vllm import SamplingParams

    tokenizer = llm.get_tokenizer()
    for index, prompt in enumerate(load.prompts()):
        tokens = load.tokens + sum(longer[index : index + 1])
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": ids}, sampling)


def run_steps(llm: Any, load: Load) -> tuple[float, list[list[float]], list[list[int]]]:
    """Step until all chats are done.

    Returns:
        The seconds in all, and for each chat the times of its outputs and its tokens.
    """
    times: list[list[float]] = [[] for _ in range(load.chats)]
    tokens: list[list[int]] = [[] for _ in range(load.chats)]
    begin = time.perf_counter()
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
        now = time.perf_counter() - begin
        for output in outputs:
            chat = int(output.request_id)
            times[chat].append(now)
            tokens[chat] = list(output.outputs[0].token_ids)
    return time.perf_counter() - begin, times, tokens


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

    add_chats(llm, load)
    seconds, times, tokens = run_steps(llm, load)

    gaps = [
        (after - earlier) * 1e3 for chat in times for earlier, after in itertools.pairwise(chat)
    ]
    result: dict[str, Any] = {
        "tok_s": sum(map(len, tokens)) / seconds,
        "seconds": seconds,
        "itl_p50_ms": percentile(gaps, 50),
        "itl_p99_ms": percentile(gaps, 99),
        "preemptions": preemptions(llm) - before,
        "num_blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
        "tokens": tokens,
    }
    if spec["pie"] is not None:
        result["pie_before"] = pie_before
        result["pie"] = pie_counters(llm)
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
