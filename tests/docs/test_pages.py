"""The README is short and true to its results; every link of the pages leads somewhere."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text()
BENCHMARKS = REPOSITORY / "docs" / "benchmarks.md"
RESULT = REPOSITORY / "benchmarks" / "results" / "throughput.json"
PICTURE = REPOSITORY / "docs" / "throughput.png"
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
    REPOSITORY / "benchmarks" / "README.md",
    REPOSITORY / "csrc" / "DESIGN.md",
]
WORDS = 700
FIGURE = re.compile(r"\b\d+\.\d+\b")


def prose(text: str) -> str:
    """A page without blocks of code and without the targets of its links."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\]\([^)]*\)", "]", text)


def links(text: str) -> list[str]:
    """Targets of a page's links and pictures, outside of blocks of code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def sections(page: Path) -> dict[str, str]:
    """Text of each section of the second level, by its anchor."""
    parts = re.split(r"^## (.*)$", page.read_text(), flags=re.MULTILINE)
    titles = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in parts[1::2]]
    return dict(zip(titles, parts[2::2], strict=True))


def test_the_readme_is_short() -> None:
    """At most 700 words, one picture, no hash of a commit."""
    words = prose(README).split()
    assert len(words) <= WORDS, len(words)
    assert len(re.findall(r"!\[", README)) == 1
    assert not re.findall(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{7,40}\b", README)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_leads_somewhere(page: Path) -> None:
    """Files beside the page, and headings in them."""
    found = [link for link in links(page.read_text()) if not re.match(r"https?://", link)]
    for link in found:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_path_is_there(page: Path) -> None:
    """Files and folders in code quotes, also where a path begins within the package."""
    folders = "pie_vllm|csrc|tests|benchmarks|docs|policy|engine|simulation|vllm"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text()):
        places = (REPOSITORY / path, REPOSITORY / "pie_vllm" / path)
        assert any(place.exists() for place in places), path


def test_every_page_is_in_the_index() -> None:
    """docs/README.md leads to all of docs."""
    index = links((REPOSITORY / "docs" / "README.md").read_text())
    names = {page.name for page in (REPOSITORY / "docs").glob("*.md")} - {"README.md"}
    assert names <= set(index)


def test_the_first_figures_are_those_of_the_result() -> None:
    """The ratios and preemptions beside the picture, and the three bars in its text."""
    result = json.loads(RESULT.read_text())
    ratios, medians = result["ratios"], result["medians"]
    head = README.partition("## ")[0]
    for pair in ("pie_starved / stock_equal", "pie_starved / stock_all"):
        assert f"**{ratios[pair]['median']:.2f}×**" in head, pair
    stock, pie = (medians[side]["preemptions"]["median"] for side in ("stock_equal", "pie_starved"))
    assert f"**{pie:.0f}**\npreemptions instead of {stock:.0f}" in head
    rates = [
        medians[side]["tok_s"]["median"] for side in ("stock_equal", "pie_starved", "stock_all")
    ]
    text = re.search(r"!\[(.*?)\]", head)
    assert text
    assert re.findall(r"\b\d+\b", text[1]) == [f"{rate:.0f}" for rate in rates]
    assert result["machine"]["date"][:10] in head


def test_the_picture_was_drawn_from_the_result() -> None:
    """It carries the day and the commit of the run that it shows."""
    with Image.open(PICTURE) as picture:
        found = {key: str(value) for key, value in picture.info.items()}
    machine = json.loads(RESULT.read_text())["machine"]
    drawn = found["Result date"], found["Result commit"]
    assert drawn == (machine["date"], machine["commit"]), "python -m benchmarks.harness.readme_plot"


def test_every_figure_of_the_readme_has_its_command() -> None:
    """It stands in the section of docs/benchmarks.md that its row leads to, beside a command."""
    rows = re.findall(
        r"^\| \[.*?\]\(docs/benchmarks\.md#(.*?)\) \| (.*?) \|$", README, re.MULTILINE
    )
    assert len(rows) > 5
    parts = sections(BENCHMARKS)
    for anchor, answer in rows:
        figures = FIGURE.findall(answer)
        assert figures, answer
        assert re.search(r"^ {4}.*(make|python) ", parts[anchor], re.MULTILINE), anchor
        for figure in figures:
            assert re.search(rf"\| {re.escape(figure)} ", parts[anchor]), (anchor, figure)


def ratios(result: dict[str, Any]) -> list[str]:
    """Ratios of a result file, in the words of the page."""
    return [
        f"{one['median']:.2f} [{one['low']:.2f} .. {one['high']:.2f}]"
        for one in result["ratios"].values()
        if one["high"] - one["low"] >= 0.01
    ]


def test_the_figures_are_those_of_the_newest_results() -> None:
    """Who measures anew writes the page anew."""
    results = RESULT.parent
    text = BENCHMARKS.read_text()
    for name in ("throughput", "serving", "link_speeds", "parking"):
        result = json.loads((results / f"{name}.json").read_text())
        parts = result["loads"].values() if name == "parking" else [result]
        missing = [ratio for part in parts for ratio in ratios(part) if ratio not in text]
        assert not missing, name
    idle = json.loads((results / "idle_cost.json").read_text())["ratio"]
    assert f"{idle['median']:.2f} [{idle['low']:.2f} .. {idle['high']:.2f}]" in text


def test_every_benchmark_has_its_question() -> None:
    """Each program of benchmarks/ that measures is a command of docs/benchmarks.md."""
    folder = REPOSITORY / "benchmarks"
    programs = {path.stem for path in folder.glob("*.py")} - {"__init__", "make_model", "gpu_check"}
    text = BENCHMARKS.read_text()
    assert "make demo" in text
    assert not {name for name in programs - {"demo"} if f"python -m benchmarks.{name}" not in text}


def test_every_result_has_a_command_that_runs_a_benchmark() -> None:
    """Each section of docs/benchmarks.md; figures have a commit and a date."""
    for anchor, text in sections(BENCHMARKS).items():
        commands = re.findall(r"^ {4}.*?(?:python -m ([\w.]+)|make (\w+))", text, re.MULTILINE)
        assert commands, anchor
        for module, target in commands:
            if module:
                assert find_spec(module), module
            else:
                makefile = (REPOSITORY / "Makefile").read_text()
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        for row in re.findall(r"^\| (?!figure)\w.*\|$", text, re.MULTILINE):
            cells = [cell.strip() for cell in row.strip("|").split(" | ")]
            if cells[1] != "figure":
                assert re.fullmatch(r"[0-9a-f]{7}(, [0-9a-f]{7})*", cells[-2]), row
                assert re.match(r"\d{4}-\d\d-\d\d", cells[-1]), row
