"""What the simulator says of real runs, from the times of stock's steps in the same round.

It is played without a prefix cache, and hides loads behind whole steps, scheduler and sampling too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from benchmarks.harness.rounds import Figures
from benchmarks.real.step_times import Step, fit, slowed_by_loads
from pie_vllm.geometry import Geometry
from pie_vllm.plan import Prior
from pie_vllm.policy.control.decider import Decider
from pie_vllm.simulation.simulator import Simulation, run_stock
from pie_vllm.simulation.traces import Job, Outcome, Profile


def add_simulated(
    figures: Mapping[str, Sequence[Figures]], specs: Mapping[str, Mapping[str, Any]]
) -> None:
    """Add `simulated_tok_s`, `to_simulated` and the `profile` that led to them; drop the traces.

    The model of a step is fitted to the steps of a round's stock runs. What a load costs, the share
    of it that no compute hides and what it takes from the compute by memory bandwidth that a CPU's
    copies share with it, is taken from that pie run of the round that loaded most: in it the total
    is no prediction, in the others it is.

    Args:
        figures: runs of each configuration, with their `trace`.
        specs: settings of the configurations, by name.
    """
    for runs in zip(*figures.values(), strict=True):
        run_of = dict(zip(figures, runs, strict=True))
        traces = {name: run.pop("trace") for name, run in run_of.items()}
        steps = {name: [Step(*step) for step in trace["steps"]] for name, trace in traces.items()}
        ours = [name for name in run_of if specs[name]["pie"] is not None]
        profile = Profile(
            1.0, *fit([step for name in run_of if name not in ours for step in steps[name]])
        )
        if ours:
            loading = max(ours, key=lambda name: sum(step.loads for step in steps[name]))
            slowed = slowed_by_loads(profile, steps[loading], run_of[loading]["stall_seconds"])
            busy = run_of[loading]["load_seconds"]
            exposed = run_of[loading]["stall_seconds"] / busy if busy else 0.0
            profile = replace(profile, per_load=slowed, exposed=exposed)
        for name, run in run_of.items():
            run["profile"] = asdict(profile)
            run["simulated_tok_s"] = _simulate(run, traces[name], specs[name], profile).throughput
            run["to_simulated"] = run["tok_s"] / run["simulated_tok_s"]


def _simulate(
    run: Figures, trace: Mapping[str, Any], spec: Mapping[str, Any], profile: Profile
) -> Outcome:
    jobs = [Job(0.0, prompt, spec["load"]["tokens"]) for prompt in trace["prompts"]]
    options = {
        "block_size": spec["llm"]["block_size"],
        "max_running": trace["max_running"],
        "max_tokens": trace["max_tokens"],
    }
    if spec["pie"] is None:
        return run_stock(run["num_blocks"], profile, jobs, **options)
    size = {key: int(value) for key, value in run["pie"].items()}
    geometry = Geometry(
        size["num_layers"],
        size["page_bytes"],
        size["resident_blocks"],
        size["pooled_blocks"],
        size["ring_slots"],
        size["rows"],
        chunk_rows=size["rows"],
        granularity=1,
    )
    link = run["bandwidth_gbps"] * 1e9
    profile = replace(profile, link=link)
    decider = Decider(
        geometry.row_bytes,
        geometry.pooled_blocks,
        spec["pie"]["target_slowdown"],
        Prior(
            link,
            step_seconds=profile.base,
            request_seconds=profile.per_request,
            prompt_seconds=profile.per_prompt_token,
            limits_contention=False,  # The host driver's copies take the compute's own cores.
        ),
    )
    return Simulation(geometry, profile, jobs, decider, **options).run()
