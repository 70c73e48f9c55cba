"""Nothing in the product that only tests or benchmarks call."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tests.helpers.source import ROOT, definitions, modules, names

ALLOWED = {
    "check_integrity": "the books' own check; tests call it after each operation",
    "find_spec": "Python's import system calls it on a finder",
    "from_param": "ctypes calls it on an argument's type",
}
"""Name: who calls it."""

DRIVEN_BY_TESTS = {
    "ENTRY": "name of the gather kernel, for tests that load it by themselves",
    "DriverEvent": "marks in a stream, in the GPU checks",
    "prefer_overlap": "TransferEngine, set by the GPU checks",
    "row_page": "where a page of a row lies, in the GPU checks",
    "seconds_until": "DriverEvent, in the GPU checks",
    "submit_head_first": "TransferEngine: order of submission, in the GPU checks",
    "page_offset": "Geometry: where a page lies, for tests that read the arena",
    "NEW_WEIGHTS": "vLLM's calls that load weights, as patched",
}
"""Name: what it is. Tests or benchmarks need it, and nothing in the product does."""


def entry_points() -> set[str]:
    """Functions that the package's metadata name."""
    return set(re.findall(r'= "pie_vllm[\w.]*:(\w+)"', (ROOT / "pyproject.toml").read_text()))


@cache
def words_of_vllm() -> frozenset[str] | None:
    """All words in the source of vLLM's engine; None where it is not installed."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    words: set[str] = set()
    for path in (Path(spec.submodule_search_locations[0]) / "v1").rglob("*.py"):
        words.update(re.findall(r"\w+", path.read_text()))
    return frozenset(words)


def overrides(name: str) -> bool:
    """Whether vLLM may call a method of this name; yes where vLLM is not there to be read."""
    words = words_of_vllm()
    return words is None or name in words


def named_in(folder: Path) -> Counter[str]:
    """How often the modules below a folder of the repository name each name."""
    total: Counter[str] = Counter()
    for tree in modules(folder).values():
        total += names(tree)
    return total


def unused() -> dict[str, str]:
    """Names that nothing outside their own definition refers to, and where they are defined.

    A name counts as used wherever it is read, whatever object it is read of: what is found is
    unused, and something unused is missed where it shares its name. The simulation is a product of
    its own, for benchmarks.
    """
    product = named_in(ROOT / "pie_vllm")
    with_benchmarks = product + named_in(ROOT / "benchmarks")
    found = {}
    for module, tree in modules().items():
        used = with_benchmarks if module.startswith("pie_vllm.simulation") else product
        seam = module.startswith("pie_vllm.vllm.")
        for name, place, node in definitions(module, tree):
            outside = used[name] - names(node)[name]
            if not outside and not name.startswith("__") and not (seam and overrides(name)):
                found[name] = place
    return found


def test_everything_has_a_caller_in_the_product() -> None:
    """Else it is deleted, or the lists above say why it stays."""
    explained = {*ALLOWED, *DRIVEN_BY_TESTS, *entry_points()}
    left = {name: place for name, place in unused().items() if name not in explained}
    assert not left, f"nothing in the product refers to {left}"


def test_no_explanation_is_out_of_date() -> None:
    """What got a caller, or is gone, needs none."""
    assert DRIVEN_BY_TESTS.keys() <= unused().keys(), DRIVEN_BY_TESTS.keys() - unused().keys()
