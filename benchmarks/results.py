"""The results of a size: a JSON file that grows case by case, and the tables made of it."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cases import Target
from measure import Run

_GIB = 2**30
_UNITS = {"wall": "s", "peak": "GiB"}


@dataclass(frozen=True)
class Result:
    """What a case came to."""

    title: str
    cache: str
    """``warm``: what a command reads is in the page cache when it starts; ``cold``: none of it is."""
    yardstick: str | None
    rows: Mapping[str, Sequence[Run]]
    targets: Sequence[Target]


@dataclass(frozen=True)
class Results:
    """All cases of a size that were measured on one machine."""

    machine: Mapping[str, str]
    cases: Mapping[str, Result]

    def with_case(self, name: str, result: Result) -> Results:
        """These, and one more case, in the place of an older result of it."""
        return Results(self.machine, {**self.cases, name: result})

    def write(self, directory: Path, size: str) -> None:
        """Write ``SIZE.json`` and ``SIZE.md``."""
        directory.mkdir(exist_ok=True)
        (directory / f"{size}.json").write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        (directory / f"{size}.md").write_text(markdown(self))


def read_results(directory: Path, size: str, machine: Mapping[str, str]) -> Results:
    """What is there from this machine; figures from another one are left behind, for they do not compare."""
    file = directory / f"{size}.json"
    if not file.exists():
        return Results(machine, {})
    document = json.loads(file.read_text())
    if document["machine"] != machine:
        return Results(machine, {})
    return Results(machine, {name: _result(case) for name, case in document["cases"].items()})


def _result(document: dict[str, object]) -> Result:
    rows, targets = document.pop("rows"), document.pop("targets")
    assert isinstance(rows, dict) and isinstance(targets, list), "as they were written"
    return Result(
        **document,  # type: ignore[arg-type]  # what `Results.write` made of the same fields
        rows={name: [Run(**run) for run in runs] for name, runs in rows.items()},
        targets=[Target(**target) for target in targets],
    )


def markdown(results: Results) -> str:
    """Everything as tables."""
    machine = "; ".join(f"{name}: {value}" for name, value in results.machine.items())
    return "\n".join([machine, "", *(line for case in results.cases.values() for line in case_lines(case))])


def case_lines(case: Result) -> Iterator[str]:
    """A case's table, and how far it is from its targets."""
    rounds = max(map(len, case.rows.values()))
    beside = f" Ratios are to `{case.yardstick}`." if case.yardstick else ""
    yield f"## {case.title}"
    yield ""
    yield f"Runs: {rounds}, interleaved. Page cache: {case.cache}.{beside}"
    yield ""
    yield "| | wall, median | wall, least | ratio of medians | ratio of minima | user | system | peak memory | read | from disk | written | to disk |"
    yield "| --- |" + " --- |" * 11
    for name, runs in case.rows.items():
        yield _row(name, runs, case.rows[case.yardstick] if case.yardstick else None)
    yield ""
    for target in case.targets:
        if target.row in case.rows and (target.beside is None or target.beside in case.rows):
            yield f"- {_verdict(target, case.rows)}"
    yield ""


def _row(name: str, runs: Sequence[Run], yardstick: Sequence[Run] | None) -> str:
    ratios = ["", ""]
    if yardstick is not None:
        ratios = [f"{of(_walls(runs)) / of(_walls(yardstick)):.2f} x" for of in (statistics.median, min)]
    cells = [
        f"`{name}`",
        f"{statistics.median(_walls(runs)):.2f} s",
        f"{min(_walls(runs)):.2f} s",
        *ratios,
        f"{statistics.median(run.user for run in runs):.2f} s",
        f"{statistics.median(run.system for run in runs):.2f} s",
        f"{_peak(runs):.2f} GiB",
    ]
    for sizes in (
        [run.asked_to_read for run in runs],
        [run.read_from_disk for run in runs],
        [run.asked_to_write for run in runs],
        [run.written_to_disk for run in runs],
    ):
        cells.append(f"{statistics.median(sizes) / _GIB:.2f} GiB")
    return f"| {' | '.join(cells)} |"


def _verdict(target: Target, rows: Mapping[str, Sequence[Run]]) -> str:
    """Whether a target is met, by the medians of wall times and the largest of peaks."""
    unit = _UNITS[target.quantity]
    found, limit = _quantity(target.quantity, rows[target.row]), target.plus
    asked = [f"{target.plus:g} {unit}"] if target.plus else []
    if target.beside is not None:
        limit += target.times * _quantity(target.quantity, rows[target.beside])
        asked.insert(0, f"{target.times:.2g} x `{target.beside}`")
    kind = "stretch, " if target.stretch else ""
    missed = f"**missed** by {found - limit:.2f} {unit} ({found / limit - 1:.0%})"
    return (
        f"`{target.row}`, {kind}{target.quantity} <= {' + '.join(asked)} = {limit:.2f} {unit}: "
        f"{found:.2f} {unit}, {'met' if found <= limit else missed}"
    )


def _quantity(quantity: str, runs: Sequence[Run]) -> float:
    return statistics.median(_walls(runs)) if quantity == "wall" else _peak(runs)


def _walls(runs: Sequence[Run]) -> list[float]:
    return [run.wall for run in runs]


def _peak(runs: Sequence[Run]) -> float:
    return max(run.peak_rss for run in runs) / _GIB
