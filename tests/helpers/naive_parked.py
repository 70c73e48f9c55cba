"""The parked index written down as plainly as possible: lists, and a search for everything."""

from __future__ import annotations

from pie_vllm.policy.pool.parked_index import ParkedIndex


class NaiveLru:
    """Keys, oldest first."""

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.order: list[int] = []
        self.pins: dict[int, int] = {}

    def _leave(self, key: int) -> int:
        if key in self.order:
            self.order.remove(key)
        return self.rows.pop(key)

    def park(self, key: int, row: int) -> None:
        self.rows[key] = row
        self.order.append(key)

    def take(self, key: int) -> int:
        return self._leave(key)

    def touch(self, key: int) -> None:
        if key not in self.pins:
            self.order.remove(key)
            self.order.append(key)

    def victim(self) -> int | None:
        return self.order[0] if self.order else None

    def evict(self) -> tuple[int, int] | None:
        key = self.victim()
        return None if key is None else (key, self._leave(key))

    def pin(self, key: int) -> None:
        self.pins[key] = self.pins.get(key, 0) + 1
        if key in self.order:
            self.order.remove(key)

    def unpin(self, key: int) -> None:
        self.pins[key] -= 1
        if not self.pins[key]:
            del self.pins[key]
            self.order.append(key)

    def drop_rows_from(self, row: int) -> list[int]:
        keys = [key for key, held in self.rows.items() if held >= row]
        return sorted(self._leave(key) for key in keys)


class NaiveArc(NaiveLru):
    """Two orders of keys, three lists of ghosts, oldest first."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.often: set[int] = set()
        self.ghosts: list[list[int]] = [[], [], []]
        self.target = 0.0

    def _parts(self) -> tuple[list[int], list[int]]:
        once = [key for key in self.order if key not in self.often]
        return once, [key for key in self.order if key in self.often]

    def _leave(self, key: int) -> int:
        self.often.discard(key)
        return super()._leave(key)

    def _remember(self, which: int, key: int) -> None:
        for ghosts in self.ghosts:
            if key in ghosts:
                ghosts.remove(key)
        if sum(map(len, self.ghosts)) == self.capacity:
            max(self.ghosts, key=len).pop(0)
        self.ghosts[which].append(key)

    def park(self, key: int, row: int) -> None:
        once, often, _ = map(len, self.ghosts)
        size = len(self.order) + 1
        if key in self.ghosts[0]:
            self.target = min(self.target + max(1, often / once), size)
        if key in self.ghosts[1]:
            self.target = max(min(self.target, size) - max(1, once / often), 0)
        for ghosts in self.ghosts:
            if key in ghosts:
                ghosts.remove(key)
                self.often.add(key)
        super().park(key, row)

    def take(self, key: int) -> int:
        row = self._leave(key)
        self._remember(2, key)
        return row

    def touch(self, key: int) -> None:
        self.often.add(key)
        super().touch(key)

    def victim(self) -> int | None:
        once, often = self._parts()
        first = once if len(once) > self.target or not often else often
        return first[0] if first else None

    def evict(self) -> tuple[int, int] | None:
        key = self.victim()
        if key is None:
            return None
        which = int(key in self.often)
        row = self._leave(key)
        self._remember(which, key)
        return key, row


def naive(policy: str, capacity: int) -> NaiveLru:
    """The plain model of a policy."""
    return NaiveArc(capacity) if policy == "arc" else NaiveLru()


def run_trace(index: ParkedIndex[int], trace: list[int]) -> list[bool]:
    """Ask for keys one after the other, park what is missing; which of them were hits.

    A hit is taken and parked again in the row it came from, as a block that a
    request used and gave back.
    """
    free = sorted(set(range(index.capacity_rows)) - index.rows())
    hits = []
    for key in trace:
        hit = key in index
        hits.append(hit)
        if hit:
            row = index.take(key)
        elif free:
            row = free.pop()
        else:
            evicted = index.evict()
            assert evicted is not None
            row = evicted[1]
        index.park(key, row)
    return hits
