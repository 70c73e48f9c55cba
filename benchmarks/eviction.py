"""Which parked block should go first? Least recent use against ARC, on traces of real requests.

A replay without lengths of time: of each request only the prefix blocks it asks for count. Blocks
are held by a device's prefix cache, which evicts what was used least recently, and by the CPU pool
behind it, as pie parks them: a block that the device evicts is parked, or counts as used if it is
parked already; a block that the pool gives back stays parked and counts as used. A request frees
its blocks last first, as vLLM does. Hits are the blocks of a request from its first on that are in
one of the two, up to the first that is in neither.

Sizes are shares of the trace's different blocks; pie's default pool is four times the device's KV,
here 8 % behind 2 %. A device of 0 is none at all, which pie never runs with: the pool sees each
request itself. Reads two formats, one JSON object a line: requests with `timestamp` and
`hash_ids` (Mooncake), and sessions with `requests`, each with `t` and `blocks`, runs of a first id
and a count (kv-cache-tester, packed), which start `--apart` seconds after each other.

    python -m benchmarks.eviction TRACE... [--shares 0.01,0.02,0.05,0.08,0.1,0.2] [--devices 0,0.02]
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from itertools import chain, takewhile
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from benchmarks.harness.display import console, table, working
from benchmarks.harness.machine import facts
from benchmarks.harness.options import plain_parser
from benchmarks.harness.result_file import RESULTS, write_result

Key = Hashable
Queue = OrderedDict[Key, None]

NEEDED_GAIN = 0.02
"""Relative gain in hits that would make a second policy worth its code."""


class Cache(ABC):
    """Blocks of one tier, in the order in which they leave it."""

    def __init__(self, capacity: int) -> None:
        """Start empty, with room for so many blocks."""
        self.capacity = capacity

    @abstractmethod
    def __contains__(self, key: Key) -> bool:
        """Whether a block is held."""

    @abstractmethod
    def use(self, key: Key) -> None:
        """A block that is held was asked for."""

    @abstractmethod
    def add(self, key: Key) -> Key | None:
        """Hold a block that is not held yet; returns the one that leaves for it."""


class Lru(Cache):
    """What was used least recently leaves first."""

    def __init__(self, capacity: int) -> None:
        """See Cache."""
        super().__init__(capacity)
        self._held: Queue = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        """See Cache."""
        return key in self._held

    def use(self, key: Key) -> None:
        """See Cache."""
        self._held.move_to_end(key)

    def add(self, key: Key) -> Key | None:
        """See Cache."""
        full = len(self._held) >= self.capacity
        gone = self._held.popitem(last=False)[0] if full else None
        self._held[key] = None
        return gone


class Arc(Cache):
    """Adaptive replacement (Megiddo and Modha, FAST 2003).

    Blocks seen once stand in one queue, blocks seen again in another. The ghosts of what was
    evicted from either say, when they return, that their queue was too short. Two differences from
    the paper: a block is chosen before the next one is known, so that a tie goes against the second
    queue; and as many ghosts as blocks are remembered of both queues together.
    """

    def __init__(self, capacity: int) -> None:
        """See Cache."""
        super().__init__(capacity)
        self._held: tuple[Queue, Queue] = (OrderedDict(), OrderedDict())
        self._ghosts: tuple[Queue, Queue] = (OrderedDict(), OrderedDict())
        self._target = 0.0

    def __contains__(self, key: Key) -> bool:
        """See Cache."""
        return key in self._held[0] or key in self._held[1]

    def use(self, key: Key) -> None:
        """See Cache."""
        once, often = self._held
        once.pop(key, None)
        often[key] = None
        often.move_to_end(key)

    def add(self, key: Key) -> Key | None:
        """See Cache."""
        once, often = self._held
        full = len(once) + len(often) >= self.capacity
        gone = self._evict() if full else None
        seen = self._recall(key, len(once) + len(often) + 1)
        (often if seen else once)[key] = None
        return gone

    def _evict(self) -> Key:
        once, often = self._held
        which = 0 if len(once) > self._target or not often else 1
        key = self._held[which].popitem(last=False)[0]
        if sum(map(len, self._ghosts)) >= self.capacity:
            max(self._ghosts, key=len).popitem(last=False)
        self._ghosts[which][key] = None
        return key

    def _recall(self, key: Key, size: int) -> bool:
        """Whether a block was seen before; if so, the target moves and the ghost is gone."""
        once, often = self._ghosts
        if key in once:
            self._target = min(self._target + max(1.0, len(often) / len(once)), size)
            del once[key]
            return True
        if key in often:
            self._target = max(min(self._target, size) - max(1.0, len(once) / len(often)), 0.0)
            del often[key]
            return True
        return False


POLICIES: dict[str, type[Cache]] = {"lru": Lru, "arc": Arc}


class Trace(NamedTuple):
    """Requests in the order of their time, each as the keys of its prefix blocks.

    Attributes:
        name: file it was read from.
        requests: keys of each request, first block first.
        asked: blocks of all requests together.
        different: number of different blocks.
    """

    name: str
    requests: list[list[Key]]
    asked: int
    different: int


def read(path: Path, apart: float) -> Trace:
    """A trace of either format; sessions start ``apart`` seconds after each other."""
    timed: list[tuple[float, list[Key]]] = []
    with path.open() as lines:
        for number, line in enumerate(lines):
            entry = json.loads(line)
            if "requests" in entry:
                timed += session(number, apart * number, entry["requests"])
            else:
                timed.append((entry["timestamp"], entry["hash_ids"]))
    timed.sort(key=lambda one: one[0])
    requests = [keys for _, keys in timed]
    different = len(set(chain.from_iterable(requests)))
    return Trace(path.name, requests, sum(map(len, requests)), different)


def session(
    number: int, start: float, requests: Sequence[dict[str, Any]]
) -> Iterable[tuple[float, list[Key]]]:
    """Times and keys of a session's requests; its ids mean nothing in another session."""
    for request in requests:
        runs = (range(first, first + count) for first, count in request["blocks"])
        yield start + request["t"], [number << 32 | block for run in runs for block in run]


class Hits(NamedTuple):
    """Blocks that need not be computed.

    Attributes:
        device: blocks found on the device.
        pool: blocks found in the pool alone.
    """

    device: int
    pool: int


def replay(trace: Trace, device: Cache | None, pool: Cache) -> Hits:
    """Hits of all requests, in turn."""

    def park(key: Key) -> None:
        if key in pool:
            pool.use(key)
        else:
            pool.add(key)

    on_device = in_pool = 0
    for keys in trace.requests:
        if device is None:
            in_pool += sum(1 for _ in takewhile(pool.__contains__, keys))
        else:
            for key in keys:
                if key in device:
                    on_device += 1
                elif key in pool:
                    in_pool += 1
                    pool.use(key)
                else:
                    break
        for key in reversed(keys):
            if device is None:
                park(key)
            elif key in device:
                device.use(key)
            elif (gone := device.add(key)) is not None:
                park(gone)
    return Hits(on_device, in_pool)


class Case(NamedTuple):
    """Sizes, as shares of the different blocks, and what share of all blocks each policy finds."""

    trace: str
    device: float
    pool: float
    hits: dict[str, float]

    @property
    def gain(self) -> float:
        """Hits that ARC finds beyond those of LRU, as a share of LRU's."""
        return self.hits["arc"] / self.hits["lru"] - 1


def measure(trace: Trace, devices: Iterable[float], shares: Sequence[float]) -> list[Case]:
    """All sizes and policies over one trace."""
    cases = []
    for device in devices:
        for share in shares:
            found = {}
            for name, policy in POLICIES.items():
                front = Lru(round(device * trace.different)) if device else None
                hits = replay(trace, front, policy(round(share * trace.different)))
                found[name] = sum(hits) / trace.asked
            cases.append(Case(trace.name, device, share, found))
    return cases


def show(cases: Sequence[Case]) -> None:
    """Print a table, and what it says about a second policy."""
    heads = ["trace", "device", "pool", *POLICIES, "gain of arc"]
    rows = [
        [
            case.trace,
            f"{case.device:.0%}",
            f"{case.pool:.0%}",
            *(f"{case.hits[name]:.2%}" for name in POLICIES),
            f"{case.gain:+.2%}",
        ]
        for case in cases
    ]
    table("Blocks found, of all that were asked for", heads, rows)
    for device in dict.fromkeys(case.device for case in cases):
        gains = sorted(case.gain for case in cases if case.device == device)
        console.print(
            f"device of {device:.0%}: arc finds {mean(gains):+.1%} blocks more than lru in the "
            f"mean of all traces and pools, {gains[0]:+.1%} to {gains[-1]:+.1%}; "
            f"{NEEDED_GAIN:+.0%} would be worth a second policy"
        )


def shares_of(text: str) -> list[float]:
    """The numbers of an option."""
    return [float(one) for one in text.split(",")]


def main() -> None:
    """The command line."""
    parser = plain_parser("eviction", __doc__)
    parser.add_argument("traces", type=Path, nargs="+", metavar="TRACE")
    parser.add_argument("--shares", type=shares_of, default=[0.01, 0.02, 0.05, 0.08, 0.1, 0.2])
    parser.add_argument("--devices", type=shares_of, default=[0.0, 0.02])
    parser.add_argument("--apart", type=float, default=60.0, help="seconds between sessions")
    parser.add_argument("--output", type=Path, default=RESULTS / "eviction")
    args = parser.parse_args()
    traces, cases = [], []
    for path in args.traces:
        with working(path.name):
            trace = read(path, args.apart)
            cases += measure(trace, args.devices, args.shares)
        traces.append(
            {"name": trace.name, "requests": len(trace.requests)}
            | {"blocks": trace.asked, "different": trace.different}
        )
    show(cases)
    found = [{**case._asdict(), "gain": case.gain} for case in cases]
    data = {"machine": facts(), "apart": args.apart, "traces": traces, "cases": found}
    write_result(args.output, data)
    console.print(f"written: {args.output.with_suffix('.json')}")


if __name__ == "__main__":
    main()
