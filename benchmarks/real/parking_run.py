"""One load of `benchmarks.parking` on one engine, in this process.

python -m benchmarks.real.parking_run SPEC.json RESULT.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.real.answering import answer_all, figures
from benchmarks.real.arrivals import Arrivals, Ask, SingleChats, Source, TurnChats, Turns
from benchmarks.real.one_run import make_llm, pie_counters, preemptions
from benchmarks.real.token_record import watched_tokens


def add_ask(llm: Any, ask: Ask) -> None:
    """Give a request to the engine: greedy, and as many tokens as it wants."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=ask.tokens, ignore_eos=True)
    prompt = {"prompt_token_ids": list(ask.prompt)}
    llm.llm_engine.add_request(ask.name, prompt, sampling)


def source_of(load: dict[str, Any]) -> Source:
    """The requests of a load as it stands in a spec."""
    if "turns" in load:
        return Turns(TurnChats(**load["turns"]))
    return Arrivals(SingleChats(**load["single"]).asks(load["rate"]))


def serve(llm: Any, load: dict[str, Any]) -> dict[str, Any]:
    """The figures of a load on an engine; of chats that return, those of all but first turns."""
    before, source = preemptions(llm), source_of(load)
    with watched_tokens(llm) as record:
        answers = answer_all(
            llm.llm_engine, source, lambda ask: add_ask(llm, ask), time.perf_counter, time.sleep
        )
    first_turn = 1 if "turns" in load else 0
    counted = [answer.ask for answer in answers if answer.ask.turn >= first_turn]
    return {
        **figures(answers, first_turn),
        "preemptions": preemptions(llm) - before,
        "recomputed_tokens": record.again,
        "prefill_tokens": sum(record.prompt[ask.name] for ask in counted),
        "prompt_tokens": sum(len(ask.prompt) for ask in counted),
    }


def main() -> None:
    """Run the spec of the first file and write the result to the second."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    llm = make_llm(spec)
    with_pie = spec["pie"] is not None
    pie_before = pie_counters(llm) if with_pie else {}
    result = serve(llm, spec["load"])
    result["num_blocks"] = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    if with_pie:
        result |= {"pie_before": pie_before, "pie": pie_counters(llm)}
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
