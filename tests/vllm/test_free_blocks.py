"""``docs/free_blocks.md`` names every reader of free blocks in the vLLM that is installed."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import vllm
from packaging.version import Version

from tests.helpers.block_readers import readers

pytestmark = pytest.mark.vllm

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "free_blocks.md"
PUBLISHED = {"0.32.0": 3, "0.33.0": 4}
"""Column of the lines, by version."""

Place = tuple[str, str]


def listed() -> dict[Place, list[str]]:
    """The rows of the document's first table, by file and function."""
    rows = [line.strip("| \n").split(" | ") for line in DOCUMENT.read_text().splitlines()]
    return {(row[0], row[1]): row for row in rows if len(row) == 7 and row[0] != "File"}


def installed(root: Path) -> dict[Place, tuple[set[str], set[int]]]:
    """Names and lines of all readers under a ``vllm`` folder, by file and function."""
    found: dict[Place, tuple[set[str], set[int]]] = defaultdict(lambda: (set(), set()))
    for reader, lines in readers(root).items():
        names, all_lines = found[reader.file, reader.function]
        names.add(reader.name)
        all_lines.update(lines)
    return found


def test_every_reader_of_free_blocks_is_listed() -> None:
    """A new reader in a new release fails this until somebody says which number it wants."""
    rows, found = listed(), installed(Path(vllm.__file__).parent)
    assert found.keys() == rows.keys()
    column = PUBLISHED.get(Version(vllm.__version__).base_version)
    for place, (names, lines) in found.items():
        row = rows[place]
        assert names == set(row[2].split(", ")), place
        if column is not None:
            assert lines == {int(line) for line in row[column].split(", ")}, place
        assert row[5], place
        assert row[6], place


def test_a_new_reader_is_noticed(tmp_path: Path) -> None:
    """Negative control: a method, an attribute and a keyword's value, each in its function."""
    (tmp_path / "new.py").write_text(
        "class Thing:\n"
        "    def full(self):\n"
        "        return self.pool.get_num_free_blocks() < self.watermark_blocks\n"
        "def used(scheduler):\n"
        "    return scheduler.kv_cache_manager.usage, scheduler.usage\n"
    )
    assert installed(tmp_path) == {
        ("new.py", "Thing.full"): ({"get_num_free_blocks", "watermark_blocks"}, {3}),
        ("new.py", "used"): ({"usage"}, {5}),
    }
