"""The process of one stage."""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from pathlib import Path

from benchmarks.gpu.harness.context import Context, NotHereError, end_with_parent
from benchmarks.gpu.harness.records import Reporter


def main() -> int:
    """`python -m benchmarks.gpu.harness.stage_process OPTIONS`: run one stage in this process."""
    end_with_parent()
    options = json.loads(sys.argv[1])
    report = Reporter(Path(options["records"]))
    context = Context(
        driver=options["driver"],
        quick=options["quick"],
        parts=tuple(options["parts"]),
        limit=options["limit"],
        deadline=time.monotonic() + options["limit"],
        scratch=Path(options["scratch"]),
        report=report,
    )
    try:
        importlib.import_module(options["module"]).run(context)
    except NotHereError as error:
        report.skip(str(error))
    except BaseException as error:
        traceback.print_exc()
        report.error(f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
