"""What the Markdown of a resizing says."""

from __future__ import annotations

from collections.abc import Iterator

from lora_merge_cli.reports.escaping import code, prose
from lora_merge_cli.reports.markdown_blocks import folded_table
from lora_merge_cli.reports.words import byte_size, counted, figure
from lora_merge_cli.resize_report import ResizedRecord, ResizeReport


def verdict(report: ResizeReport) -> str:
    """The outcome in a few words."""
    return (
        f"{prose(report.method)} adapter {report.status}: {ranks(report)} in {counted(len(report.modules), 'module')}"
    )


def findings(report: ResizeReport) -> Iterator[str]:
    """What was asked for, what is lost, and what is saved."""
    asked = f"rank {report.rank}" if report.energy is None else f"{share(report.energy)} of each delta's energy"
    yield f"Asked for: {asked}. Kept: {share(report.energy_kept)} of all, with a relative error of {figure(report.relative_error)}."
    yield f"Factors {sizes(report)}."
    if report.output is not None:
        yield f"Output: {code(report.output)}."


def tables(report: ResizeReport) -> Iterator[str]:
    """The modules, those that lose most first."""
    yield "## Modules"
    header = ["module", "shape", "rank", "dtype", "energy kept", "relative error", "delta norm"]
    yield folded_table("modules", header, list(map(_row, most_lost_first(report))))


def ranks(report: ResizeReport) -> str:
    """The ranks before and after: ``rank 32 to 4-16``."""
    before, after = (
        _span([getattr(module, name) for module in report.modules]) for name in ("rank_before", "rank_after")
    )
    return f"rank {before} to {after}" if before != after else f"rank {before} stays"


def sizes(report: ResizeReport) -> str:
    """The bytes before and after."""
    factors = f"{byte_size(report.factor_bytes_before)} to {byte_size(report.factor_bytes_after)}"
    return f"{factors}, all tensors {byte_size(report.bytes_before)} to {byte_size(report.bytes_after)}"


def share(value: float) -> str:
    """A share of the energy in per cent; 100 % of nothing less than all to the digits shown."""
    shown = f"{value:.2%}"
    return shown if value == 1 or shown != "100.00%" else ">99.99%"


def most_lost_first(report: ResizeReport) -> list[ResizedRecord]:
    """The modules by relative error, descending."""
    return sorted(report.modules, key=lambda module: -(module.relative_error or 0.0))


def _row(module: ResizedRecord) -> list[str]:
    changed = module.dtype_before != module.dtype_after
    return [
        code(module.module),
        f"{module.shape[0]} x {module.shape[1]}",
        f"{module.rank_before} to {module.rank_after}"
        if module.rank_before != module.rank_after
        else f"{module.rank_before}",
        f"{module.dtype_before} to {module.dtype_after}" if changed else module.dtype_before,
        share(module.energy_kept),
        figure(module.relative_error),
        figure(module.norm),
    ]


def _span(values: list[int]) -> str:
    least, most = min(values), max(values)
    return str(least) if least == most else f"{least}-{most}"
