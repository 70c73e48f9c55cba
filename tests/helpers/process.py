"""What this process uses."""

from __future__ import annotations

import os


def resident_bytes() -> int:
    """Memory of this process that is there now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")
