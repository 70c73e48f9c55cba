"""Every family's small model with stock vLLM and with pie: `make models`.

``python -m tests.models_sweep`` starts each engine in a process of its own, with a time limit,
prints a table and writes docs/models.md; ``--only FAMILY ...`` writes these rows anew. Each family
whose tokens are stock's is run once more with loads switched off: its tokens must change, or
equal ones would say nothing. Those that have float32 here are run with prompts that come back, and
with too little memory for all, where schedules differ from stock's. The exit status is 1 where a
family does not do what its entry in tests/helpers/small_models.py says.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers.engine import ENVIRONMENT, EngineError, Setup
from tests.helpers.engine_load import tokens
from tests.helpers.model import REPOSITORY
from tests.helpers.model_runs import (
    check_preempted,
    check_returning,
    check_same,
    pie_setup,
    pooled_at_peak,
    returning_rounds,
    rounds,
    stock_setup,
    too_small,
    unknown_setup,
    with_prefix_caching,
)
from tests.helpers.small_models import FAMILIES, make

PAGE = REPOSITORY / "docs" / "models.md"
SECONDS = 300
"""Limit of one engine's start and load; the slowest takes a tenth of it."""

LINE_MAX = 240
"""Characters of an error that the table has."""

FORK = multiprocessing.get_context("fork")
SAME, FAILED, NOT_RUN = "same tokens", "FAILED", "not run"
HEAD = """# Models

What pie does with the kinds of models that vLLM runs on a CPU. Each row is a small model with
random weights in the shape of its family, run with stock vLLM and with pie on the same 32 requests
(`make models` writes this page). *KV cache groups* are vLLM's: kind, times layers. *Pooled* is the
share of the full-attention blocks that were in CPU memory at the peak. *Prompts come back*: with
prefix caching, 32 prompts that begin as earlier ones. *Preempted*: with memory for half of the
blocks. In these two other batches mean other rounding, so families for which vLLM has kernels for
CPUs in bfloat16 only were not run.

| family | KV cache groups | with pie | pooled | prompts come back | preempted |
|---|---|---|---|---|---|
"""


class Row(NamedTuple):
    """What one family did."""

    family: str
    groups: str
    result: str
    pooled: str = ""
    returning: str = ""
    preempted: str = ""

    def text(self) -> str:
        """The row of the page's table."""
        return f"| {' | '.join(cell.replace('|', '/') for cell in self)} |"


def run(
    setup: Setup, kind: str, log: Path, asked: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """The record of each round on an engine in a process of its own, which has imports done.

    Raises:
        EngineError: what the engine raised, as ``Type: text``, or that it hangs or died.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    answers, answer = FORK.Pipe(duplex=False)
    process = FORK.Process(
        target=_engine, args=(setup.engine(kind), log, asked or rounds(), answer)
    )
    process.start()
    answer.close()
    try:
        if not answers.poll(SECONDS):
            raise EngineError(f"Hang: no answer within {SECONDS} s; see {log}")
        records = answers.recv()
    except EOFError:
        raise EngineError(f"Death: the process ended without an answer; see {log}") from None
    finally:
        process.kill()
        process.join()
    if isinstance(records, str):
        raise EngineError(records)
    found: list[dict[str, Any]] = records
    return found


def _engine(settings: dict[str, Any], log: Path, asked: list[dict[str, Any]], answer: Any) -> None:
    """Run the rounds in this process; answer with their records, or with the error as text."""
    from tests.helpers.engine_worker import Engine

    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    try:
        engine = Engine(settings)
        answer.send([engine.run(round_) for round_ in asked])
    except Exception as error:
        traceback.print_exc()
        answer.send(f"{type(error).__name__}: {error}")
    finally:
        sys.stderr.flush()
        os._exit(0)  # What engines leave behind dies with the process.


def _import_all() -> None:
    """Import what every engine needs, once."""
    os.environ.update(ENVIRONMENT)
    import transformers

    from tests.helpers.engine_worker import import_vllm

    assert transformers.AutoModelForCausalLM
    import_vllm()


def first_line(failure: Exception) -> str:
    """What is said first, without the name of pie's error, and not all of a long list."""
    line = str(failure).strip().partition("\n")[0]
    line = re.sub(r"^(UnsupportedError|ConfigError): ", "", line)
    return line if len(line) <= LINE_MAX else f"{line[:LINE_MAX]} ..."


def groups_of(record: dict[str, Any]) -> str:
    """KV cache groups, equal ones counted."""
    names = [f"{one['kind'].removesuffix('Spec')} × {one['layers']}" for one in record["groups"]]
    counts = {name: names.count(name) for name in names}
    return ", ".join(name if n == 1 else f"{n} of {name}" for name, n in counts.items())


def sweep(name: str, folder: Path, logs: Path) -> Row:
    """Run one family with stock and with pie."""
    model = make(name, folder / name)
    try:
        (stock,) = run(stock_setup(name, model), "stock", logs / f"{name}-stock.log")
    except EngineError as failure:
        return without_stock(name, model, failure, logs)
    setup = pie_setup(name, model, stock)
    try:
        (pie,) = run(setup, "pie", logs / f"{name}-pie.log")
        check_same(pie, stock, setup)
        blind = replace(setup, debug=("skip_loads",))
        (without,) = run(blind, "pie", logs / f"{name}-blind.log")
        assert tokens(without) != tokens(stock), "the same tokens without loads"
    except (EngineError, AssertionError) as failure:
        return Row(name, groups_of(stock), verdict(failure))
    share, full = pooled_at_peak(pie)
    row = Row(name, groups_of(stock), SAME, f"{share} of {full} blocks", NOT_RUN, NOT_RUN)
    if setup.dtype != "float32":
        return row
    return row._replace(
        returning=returning(name, model, logs), preempted=preempted(setup, stock, logs / name)
    )


def returning(name: str, model: Path, logs: Path) -> str:
    """What prompts that come back give."""
    asked = with_prefix_caching(stock_setup(name, model))
    try:
        stock = run(asked, "stock", logs / f"{name}-stock-returning.log", returning_rounds())
    except EngineError as failure:
        return f"stock vLLM cannot: {first_line(failure)}"
    if not any(answer["cached_tokens"] for answer in stock[1]["answers"]):
        return "stock vLLM finds nothing"
    setup = with_prefix_caching(pie_setup(name, model, stock[1]))
    try:
        check_returning(
            run(setup, "pie", logs / f"{name}-returning.log", returning_rounds()), stock
        )
    except (EngineError, AssertionError) as failure:
        return verdict(failure)
    return SAME


def preempted(setup: Setup, stock: dict[str, Any], log: Path) -> str:
    """What too little memory for all gives; not with all families does stock then equal itself."""
    starved = too_small(setup)
    try:
        (pie,) = run(starved, "pie", log.with_name(f"{log.name}-preempted.log"))
        if tokens(pie) != tokens(stock):
            (own,) = run(starved, "starved", log.with_name(f"{log.name}-stock-preempted.log"))
            if own["preempted"] and tokens(own) != tokens(stock):
                return "stock vLLM's are others, too"
        check_preempted(pie, stock)
    except (EngineError, AssertionError) as failure:
        return verdict(failure)
    return SAME


def without_stock(name: str, model: Path, failure: EngineError, logs: Path) -> Row:
    """The row of a family that stock vLLM does not run here: pie may refuse it all the same."""
    if FAMILIES[name].refused:
        try:
            run(unknown_setup(name, model), "pie", logs / f"{name}-pie.log")
        except EngineError as refusal:
            return Row(name, "", verdict(refusal))
    return Row(name, "", f"stock vLLM cannot: {first_line(failure)}")


def verdict(failure: Exception) -> str:
    """A refusal in pie's words, or what failed."""
    if str(failure).startswith(("UnsupportedError", "ConfigError")):
        return f"refused: {first_line(failure)}"
    if not str(failure):  # An assertion without words: its line says what.
        return f"{FAILED}: {traceback.extract_tb(failure.__traceback__)[-1].line}"
    return f"{FAILED}: {first_line(failure)}"


def as_expected(row: Row) -> bool:
    """Whether a family did what its entry says."""
    family = FAMILIES[row.family]
    if family.not_in_stock:
        return re.search(family.not_in_stock, row.result) is not None
    if family.refused:
        return re.search(f"^refused: .*{family.refused}", row.result) is not None
    return row.result == SAME and FAILED not in row.returning + row.preempted


def main() -> int:
    """Run the families, print their rows, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=sorted(FAMILIES),
        metavar="FAMILY",
        help="other rows of the page stay",
    )
    parser.add_argument("--logs", type=Path, default=REPOSITORY / "build" / "models-sweep")
    given = parser.parse_args()
    _import_all()
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only or FAMILIES:
            row = sweep(name, Path(folder), given.logs)
            fine &= as_expected(row)
            print(row.text(), "" if as_expected(row) else "<- NOT AS EXPECTED", flush=True)
            write_page(row)
    return int(not fine)


def write_page(row: Row) -> None:
    """Write the page with this row anew, and with the rows that it has of other families."""
    rows = {row.family: row for row in page_rows()} | {row.family: row}
    kept = [rows[name].text() for name in FAMILIES if name in rows]
    PAGE.write_text(HEAD + "\n".join([*kept, ""]))


def page_rows() -> list[Row]:
    """The table of the page."""
    lines = PAGE.read_text().partition("|---|\n")[2].splitlines() if PAGE.exists() else []
    return [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines]


if __name__ == "__main__":
    sys.exit(main())
