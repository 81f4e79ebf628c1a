"""The figures of an HTML report that are worth a glance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TypeAlias

from lora_merge_cli.report import InterpolateReport, ModelReport, OutputReport, Report, SweepReport
from lora_merge_cli.reports import AnyModelReport
from lora_merge_cli.reports.kinds import largest, least
from lora_merge_cli.reports.parts import relative_distance
from lora_merge_cli.reports.rounding_rows import rounded_rows
from lora_merge_cli.reports.words import beside, byte_size, counted, figure, gain_along_inputs

Tile: TypeAlias = tuple[str, str, str]
"""A figure worth a glance: its name, its value, and what it is of."""


def model_tiles(report: AnyModelReport) -> Iterator[Tile]:
    """Those of a merge, of an interpolation and of their judge."""
    if isinstance(report, InterpolateReport):
        yield from _interpolated(report)
    else:
        yield from _adapted(report)
    gains, rows = list(_gains(report)), rounded_rows(report)
    nearest = least(row.gains[0] for row in rows)
    if gains:
        would = "" if nearest is None else f"; {figure(nearest)} to nearest"
        yield f"least gain in {report.serving_dtype}", figure(min(gains)[0]), f"{min(gains)[1]}{would}"
    error = largest(row.errors[1] for row in rows)
    if error is not None:
        would = f"{figure(largest(row.errors[0] for row in rows))} to nearest"
        yield "largest error along inputs", figure(error), would
    shares = [(site.proof.worst_share, site.label) for site in report.sites if site.proof is not None]
    if shares:
        worst = max(shares, key=lambda share: float("inf") if share[0] is None else share[0])
        yield "worst share of its bound", "not finite" if worst[0] is None else figure(worst[0]), worst[1]
    if isinstance(report, OutputReport):
        planned = (
            "of arrays" if report.bytes_on_disk is None else f"on disk; {byte_size(report.output_bytes)} of arrays"
        )
        yield "output", byte_size(report.bytes_on_disk or report.output_bytes), planned
    yield from costs(report)


def sweep_tiles(report: SweepReport) -> Iterator[Tile]:
    """Those of an interpolation at several alphas."""
    alphas = [point.alpha for point in report.points]
    yield "alphas", str(len(alphas)), f"{min(alphas):g} to {max(alphas):g}" if alphas else ""
    sizes = [point.bytes_on_disk for point in report.points if point.bytes_on_disk is not None]
    if sizes:
        yield "outputs", byte_size(sum(sizes)), f"on disk, in {counted(len(sizes), 'checkpoint')}"
    yield from costs(report)


def costs(report: Report) -> Iterator[Tile]:
    """Time and memory, as far as they are known."""
    output = report if isinstance(report, OutputReport) else None
    if report.seconds is not None:
        device = output.device if output is not None else None
        yield "time", _time(report.seconds), f"on {device}" if device else ""
    if report.peak_rss_bytes is not None:
        yield "peak memory", byte_size(report.peak_rss_bytes), "resident"
    elif output is not None:
        yield "peak memory", byte_size(output.peak_bytes_planned), "estimated"


def _interpolated(report: InterpolateReport) -> Iterator[Tile]:
    special = bool(report.mixing.overrides) or report.mixing.schedule is not None
    yield (
        "alpha",
        f"{report.mixing.alpha:g}",
        "not everywhere, see mixing" if special else "0 is the base, 1 the fine-tune",
    )
    distance = relative_distance(report.parts)
    if distance is not None:
        yield "|W - W_base| / |W_base|", figure(distance), "of all parts together"


def _adapted(report: ModelReport) -> Iterator[Tile]:
    adapters = beside(report)
    if adapters:
        yield "sites", str(len(report.sites)), f"of {counted(len(adapters), 'adapter')}"
    else:
        experts = Counter(site.group for site in report.sites)
        yield "adapters", str(len(report.sites)), ", ".join(f"{count} {group}" for group, count in experts.items())
    largest = max(report.sites, key=lambda site: site.relative_norm or 0, default=None)
    if largest is not None and largest.relative_norm is not None:
        yield "largest |delta| / |kernel|", figure(largest.relative_norm), largest.label


def _gains(report: ModelReport) -> Iterator[tuple[float, str]]:
    for site in report.sites:
        gain = gain_along_inputs(site, report.serving_dtype)
        if gain is not None:
            yield gain, site.label


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
