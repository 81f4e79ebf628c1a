"""How many threads to use."""

from __future__ import annotations

import os

from lora_merge_cli.errors import UsageError

_MOST = 8


def jobs_or_default(jobs: int | None) -> int:
    """What the user asks for; else one job per processor that this process may use, up to 8: each holds a few blocks in memory.

    Raises:
        UsageError: It is below 1.
    """
    if jobs is not None:
        if jobs < 1:
            raise UsageError("--jobs must be at least 1", found=jobs)
        return jobs
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, _MOST)
