"""Which stages there are, and which of them a command line asks for. Imports none of them."""

from __future__ import annotations

from typing import NamedTuple

LIMIT_SECONDS_MAX = 540
"""Upper bound on a stage's time limit: machines are lent for commands of ten minutes."""


class Stage(NamedTuple):
    """A stage of the check.

    Attributes:
        name: name of the stage on the command line and in the results.
        question: question that the stage answers.
        limit: seconds after which it is killed.
        parts: what can be chosen of it, `name:part,part`; none can where it is empty.
        native: whether it needs the native engine.
        code: module whose `run` it is; the one of its name in benchmarks.gpu where empty.
    """

    name: str
    question: str
    limit: int
    parts: tuple[str, ...] = ()
    native: bool = True
    code: str = ""

    @property
    def module(self) -> str:
        """Where its `run` is."""
        return self.code or f"benchmarks.gpu.{self.name}"


STAGES = {
    stage.name: stage
    for stage in (
        Stage("facts", "What machine, device, link and software is this?", 120, native=False),
        Stage("memory", "Is the CPU memory there that stages count on?", 60, native=False),
        Stage(
            "aliases",
            "Is memory that is mapped several times one memory, in streams and in graphs?",
            240,
            ("self_test", "stream", "graph"),
        ),
        Stage(
            "copies",
            "How fast are copies, by size, number and direction, and how near to the link's peak "
            "are real plans?",
            420,
            ("peak", "single", "plans", "real", "gather"),
        ),
        Stage(
            "pinning",
            "What does it cost to take and give back pool memory?",
            240,
            ("chunks", "cores", "beside", "torch", "tables"),
        ),
        Stage(
            "overlap",
            "How much of the loads do decode steps hide, and what do loads take from them?",
            480,
            ("ring2", "ring3", "ring4"),
        ),
        Stage(
            "exactness",
            "Are vLLM's tokens and logprobs those of stock vLLM, bit for bit?",
            LIMIT_SECONDS_MAX,
            (
                *("v1", "v2", "flash_attn", "triton_attn", "flashinfer"),
                *(
                    "float32",
                    "bfloat16",
                    "eager",
                    "piecewise",
                    "compiled",
                    "full",
                    "sync",
                    "async",
                    "plain",
                    "windows",
                    "control",
                ),
            ),
        ),
        Stage(
            "serving",
            "Throughput, TPOT and TTFT at equal GPU bytes: stock, pie and vLLM's own offloading",
            LIMIT_SECONDS_MAX,
            (
                *("stock", "pie", "pie_full", "piecewise", "stock_all", "pie_idle"),
                *("connector", "prefetch"),
            ),
        ),
        Stage(
            "parking",
            "Chats that come back, and preempted ones: is pie's parked KV worth more than that of "
            "vLLM's own offloading?",
            LIMIT_SECONDS_MAX,
            (
                *("returning", "preempted"),
                *("stock", "pie", "connector", "pie_off", "stock_all"),
            ),
        ),
        Stage(
            "graphs",
            "Are idle steps as long as stock's (FULL graphs kept), and streaming ones within 1 %? "
            "Are copies inside of graphs right?",
            LIMIT_SECONDS_MAX,
            ("engine", "idle", "streaming", "full"),
        ),
    )
}


class Wanted(NamedTuple):
    """A stage that was asked for.

    Attributes:
        stage: which.
        parts: parts of the stage that are run; all where empty.
    """

    stage: Stage
    parts: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Stage and parts in the words of the command line."""
        return self.stage.name + (":" + ",".join(self.parts) if self.parts else "")


def parse_stages(text: str) -> list[Wanted]:
    """The stages of `facts,serving:pie,stock`, in the order of the check; all for no text.

    A word after `stage:` that names no stage is one more part of that stage.

    Raises:
        ValueError: an unknown stage or part; names the valid ones.
    """
    wanted: dict[str, list[str]] = {}
    last = ""
    for word in filter(None, text.replace(" ", "").split(",")):
        name, colon, part = word.partition(":")
        if not colon and last and name not in STAGES:
            name, part = last, name
        if name not in STAGES:
            raise ValueError(f"unknown stage {name!r}; valid stages are {', '.join(STAGES)}")
        if part and part not in STAGES[name].parts:
            valid = ", ".join(STAGES[name].parts) or "none"
            raise ValueError(f"unknown part {part!r} of stage {name}; valid parts are {valid}")
        wanted.setdefault(name, [])
        if part and part not in wanted[name]:
            wanted[name].append(part)
        last = name if colon or part else ""
    names = wanted or {name: [] for name in STAGES}
    return [Wanted(STAGES[name], tuple(names[name])) for name in STAGES if name in names]
