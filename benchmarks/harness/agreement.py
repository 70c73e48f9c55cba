"""What the simulator says of real runs, from the times of stock's steps in the same round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.harness.rounds import Figures
from benchmarks.harness.step_times import Step, fit, slowed_by_loads
from pie_vllm.policy.decider import Decider
from pie_vllm.policy.detector import Prior
from pie_vllm.policy.geometry import Geometry
from pie_vllm.policy.simulator import Simulation
from pie_vllm.policy.traces import Decides, Job, Outcome, Profile, Static

STOCK = ("stock_equal", "stock_all")


def add_simulated(
    figures: Mapping[str, Sequence[Figures]], setup: Mapping[str, Mapping[str, Any]]
) -> None:
    """Add `simulated_tok_s` to each run, and drop the runs' traces.

    The model of a step is fitted to both stock runs of a round. What a load costs beyond the stall,
    by the memory bandwidth that a CPU's copies and its compute share, is taken from that pie run of
    the round that loaded most; for the others it is a prediction.

    Args:
        figures: runs with their `trace`, by configuration.
        setup: their specs.
    """
    for runs in zip(*figures.values(), strict=True):
        of = dict(zip(figures, runs, strict=True))
        traces = {name: run.pop("trace") for name, run in of.items()}
        steps = {name: [Step(*step) for step in trace["steps"]] for name, trace in traces.items()}
        stock = [step for name in STOCK if name in steps for step in steps[name]]
        ours = [name for name in of if name not in STOCK]
        if not stock:
            continue
        profile = Profile(1.0, *fit(stock))
        if ours:
            most = max(ours, key=lambda name: sum(step.loads for step in steps[name]))
            slowed = slowed_by_loads(profile, steps[most], of[most]["stall_seconds"])
            profile = replace(profile, per_load=slowed)
        for name, run in of.items():
            outcome = _simulate(run, traces[name], setup[name], profile)
            run["simulated_tok_s"] = outcome.throughput


def _simulate(
    run: Figures, trace: Mapping[str, Any], spec: Mapping[str, Any], profile: Profile
) -> Outcome:
    jobs = [Job(0.0, prompt, spec["load"]["tokens"]) for prompt in trace["prompts"]]
    decider: Decides = Static(0)
    if spec["pie"] is None:
        geometry = Geometry(1, 1, run["num_blocks"], 1, 1, 1, 1, 1)
    else:
        of = {key: int(value) for key, value in run["pie"].items()}
        geometry = Geometry(
            of["num_layers"],
            of["page_bytes"],
            of["resident_blocks"],
            of["pooled_blocks"],
            of["ring_slots"],
            of["rows"],
            chunk_rows=of["rows"],
            granularity=1,
        )
        link = run["bandwidth_gbps"] * 1e9
        profile = replace(profile, link=link, exposed=1 / geometry.num_layers)
        target = spec["pie"].get("target_slowdown")
        decider = Decider(geometry.row_bytes, geometry.pooled_blocks, target, Prior(link))
    return Simulation(
        geometry,
        profile,
        jobs,
        decider,
        block_size=spec["llm"]["block_size"],
        max_running=trace["max_running"],
        max_tokens=trace["max_tokens"],
    ).run()
