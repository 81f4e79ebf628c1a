"""What the Markdown of an interpolation at several alphas says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lora_merge_cli.report import PartRecord, PointRecord, SweepReport
from lora_merge_cli.reports.escaping import code, prose
from lora_merge_cli.reports.markdown_blocks import bullets, details, folded_table
from lora_merge_cli.reports.markdown_inputs import inputs_table, made_with
from lora_merge_cli.reports.parts import part_names, part_of, relative_distance, share_of_base
from lora_merge_cli.reports.rounding_rows import rounding_in_words
from lora_merge_cli.reports.words import byte_size, counted, figure, model_name, sweep_in_words

_DISTANCE = "|W_alpha - W_base| / |W_base| of each part, as stored."
_SURVIVAL = "Gain of each part's change, stored / as servers cast it to {served}: 1 keeps it. Least gains are along the adapters' inputs."


def verdict(report: SweepReport) -> str:
    """The outcome in a few words, and how many outputs failed."""
    name = model_name(report)
    outcome = {"planned": "planned", "complete": "complete", "incomplete": "INCOMPLETE"}[report.status]
    said = f"sweep of {counted(len(report.points), 'alpha')} {outcome}"
    failed = len(_failed(report))
    return f"{f'{prose(name)}: ' if name else ''}{said}{f', {failed} failed' if failed else ''}"


def findings(report: SweepReport) -> Iterator[str]:
    """Which alphas there are, and why some failed."""
    yield f"Mixing: {prose(sweep_in_words(report))}."
    rounding = rounding_in_words(report)
    if rounding is not None:
        yield f"Rounding: {prose(rounding)}."
    failed = _failed(report)
    if failed:
        yield bullets(
            f"**FAIL** alpha {point.alpha:g}: {prose(point.error or 'no reason is known')}" for point in failed
        )


def tables(report: SweepReport) -> Iterator[str]:
    """Every alpha, what it did to each part, and what is folded away."""
    yield "## Outputs"
    header = ["alpha", "output", "status", "share", "least gain stored", "least gain served", "size", "error"]
    yield folded_table("outputs", header, [_point_row(point) for point in report.points])
    names = part_names(report.points)
    if names:
        measured = [point for point in report.points if point.parts]
        header = ["alpha", *map(prose, names)]
        yield "## Distance from the base"
        yield folded_table("alphas", header, [_cells(point, names, _share) for point in measured])
        yield f"{_DISTANCE} The share above is of all parts."
        yield "## Survival of the change"
        yield folded_table("alphas", header, [_cells(point, names, _gains) for point in measured])
        yield _SURVIVAL.format(served=prose(report.serving_dtype))
    yield details("Inputs and provenance", inputs_table(report.sources), bullets(_provenance(report)))


def _failed(report: SweepReport) -> list[PointRecord]:
    return [point for point in report.points if point.status == "failed"]


def _point_row(point: PointRecord) -> list[str]:
    return [
        f"{point.alpha:g}",
        code(point.output),
        point.status.upper() if point.status == "failed" else point.status,
        figure(relative_distance(point.parts)),
        figure(point.least_gain_stored),
        figure(point.least_gain_served),
        "-" if point.bytes_on_disk is None else byte_size(point.bytes_on_disk),
        prose(point.error) if point.error else "-",
    ]


def _cells(point: PointRecord, names: Sequence[str], cell: Callable[[PartRecord], str]) -> list[str]:
    found = (part_of(point, name) for name in names)
    return [f"{point.alpha:g}", *("-" if part is None else cell(part) for part in found)]


def _share(part: PartRecord) -> str:
    return figure(share_of_base(part.distance, part))


def _gains(part: PartRecord) -> str:
    return f"{figure(part.gain_stored)} / {figure(part.gain_served)}"


def _provenance(report: SweepReport) -> Iterator[str]:
    if report.output is not None:
        yield f"outputs: {code(report.output)}"
    yield from made_with(report)
