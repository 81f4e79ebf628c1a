"""Whole commands, timed: wall, user and system seconds, and peak memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence

Run = tuple[float, float, float, float]
"""Wall, user and system seconds, and peak resident GiB."""


def timed(command: Sequence[str]) -> Run:
    """One run of a command, with its data on disk at the end."""
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    wall = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {os.waitstatus_to_exitcode(status)}")
    return wall, usage.ru_utime, usage.ru_stime, usage.ru_maxrss / 2**20


def print_table(rows: Mapping[str, Sequence[Run]]) -> None:
    """Medians and minima of all runs, by name."""
    print(f"{'':18}{'wall median':>12}{'wall min':>10}{'user':>8}{'sys':>8}{'peak GiB':>10}")
    for name, runs in rows.items():
        wall, user, system, peak = zip(*runs, strict=True)
        middle = [statistics.median(values) for values in (wall, user, system)]
        print(f"{name:18}{middle[0]:11.2f}s{min(wall):9.2f}s{middle[1]:7.1f}s{middle[2]:7.1f}s{max(peak):10.2f}")


def median_ratio(rows: Mapping[str, Sequence[Run]], one: str, other: str) -> float:
    """How many times the wall time of one is that of another, by their medians."""
    return statistics.median(run[0] for run in rows[one]) / statistics.median(run[0] for run in rows[other])
