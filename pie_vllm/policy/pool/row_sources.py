"""Which resident block a row of parked KV came from, where blocks of one key may differ."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence


class RowSources:
    """Resident blocks that parked rows were stored from or filled into, while these are in use.

    What a head that drafts (EAGLE, MTP) keeps of a block's last token depends on the token behind,
    so that another block of the same key may not take the row. Where blocks of one key are all the
    same, each row is good for any of them, and nothing is noted.

    Attributes:
        distinct: Whether blocks of one key may differ.
        residents: Resident block by row; read only.
    """

    def __init__(self, row_of: Callable[[Hashable], int | None], *, distinct: bool) -> None:
        """Know of no row; ``row_of`` gives the row that holds the KV of a key, or None."""
        self._row_of = row_of
        self.distinct = distinct
        self.residents: dict[int, int] = {}

    def note(self, rows: Sequence[int], residents: Sequence[int]) -> None:
        """These rows hold what these residents do."""
        if self.distinct:
            self.residents.update(zip(rows, residents, strict=True))

    def forget(self, rows: Iterable[int]) -> None:
        """No resident block is known to be the one that is in these rows."""
        if self.residents:
            for row in rows:
                self.residents.pop(row, None)

    def has(self, key: Hashable, resident: int) -> bool:
        """Whether the row of a parked key holds the KV of this very block."""
        if not self.distinct:
            return True
        row = self._row_of(key)
        return row is not None and self.residents.get(row) == resident
