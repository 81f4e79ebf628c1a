"""Measure the tool beside a plain copy, and write results/SIZE.json and results/SIZE.md.

Each round runs every command of a case once, with the disks synced before and within each timing, and every output of the round
before removed. Inputs are made in data/ once; what is there is used again.

    python benchmarks/run.py [--size small|full] [--cases NAME,...] [--runs N] [--cold] [--discard]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cases import Case, Input
from catalog import CASES, DATA, outputs
from machine import describe
from measure import Run, measured, settle_cache
from results import Result, case_lines, read_results

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def make(given: Input) -> None:
    """Make an input unless it is there already, in a process of its own: a child's peak memory starts at its parent's."""
    if given.path.exists():
        return
    partial = given.path.with_name(f"{given.path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _say(f"making {given.path.relative_to(HERE)}")
    subprocess.run([sys.executable, str(HERE / given.script), str(partial), *given.flags], check=True)
    partial.rename(given.path)


def measure_case(case: Case, runs: int, *, warm: bool) -> Result:
    """Run every command of a case so many times, round by round."""
    for given in case.inputs:
        make(given)
    rows = case.rows()
    measurements: dict[str, list[Run]] = {row.name: [] for row in rows}
    try:
        for number in range(runs):
            _clear(case)
            for row in rows:
                _say(f"{case.name}, round {number + 1} of {runs}: {row.name}")
                if row.writes is not None:
                    shutil.rmtree(row.writes, ignore_errors=True)
                settle_cache(row.reads, warm=warm)
                measurements[row.name].append(measured(row.command))
    finally:
        shutil.rmtree(outputs(case.name), ignore_errors=True)
    return Result(case.title, "warm" if warm else "cold", case.yardstick, measurements, case.targets)


def _clear(case: Case) -> None:
    shutil.rmtree(outputs(case.name), ignore_errors=True)
    outputs(case.name).mkdir(parents=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _discard(done: Case, remaining: Sequence[Case]) -> None:
    """Remove the inputs of a case that no later one uses."""
    needed = {given.path for case in remaining for given in case.inputs}
    for given in done.inputs:
        if given.path not in needed:
            shutil.rmtree(DATA / given.path.relative_to(DATA).parts[0], ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=("small", "full"), default="small", help="all cases of this size")
    parser.add_argument("--cases", metavar="NAME,...", help=f"these instead: {', '.join(case.name for case in CASES)}")
    parser.add_argument("--runs", type=int, help="instead of each case's own number")
    parser.add_argument(
        "--cold", action="store_true", help="drop what a command reads from the page cache before it runs"
    )
    parser.add_argument("--discard", action="store_true", help="remove each input after its last case")
    options = parser.parse_args()
    names = options.cases.split(",") if options.cases else [case.name for case in CASES if case.size == options.size]
    unknown = set(names) - {case.name for case in CASES}
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    chosen = [case for case in CASES if case.name in names]
    machine = describe(HERE)
    for number, case in enumerate(chosen):
        result = measure_case(case, options.runs or case.runs, warm=not options.cold)
        read_results(RESULTS, case.size, machine).with_case(case.name, result).write(RESULTS, case.size)
        print("\n".join(case_lines(result)), flush=True)
        if options.discard:
            _discard(case, chosen[number + 1 :])


if __name__ == "__main__":
    main()
