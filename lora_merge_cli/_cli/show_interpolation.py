"""An interpolation for people: at one alpha, and a sweep over several."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_merge_cli._cli.console import plain_table, print_lines, shown, stdout_console
from lora_merge_cli._cli.heatmap import print_heatmaps
from lora_merge_cli._cli.show_checks import print_checks
from lora_merge_cli._cli.show_merge import print_changes, print_needs, print_written
from lora_merge_cli._cli.show_rounding import print_rounding
from lora_merge_cli._cli.site_tables import print_planned_sites, print_written_sites
from lora_merge_cli.records import first_names
from lora_merge_cli.report import InterpolateReport, MixedRecord, PartRecord, PointRecord, SweepReport
from lora_merge_cli.reports.rounding_rows import has_nearest
from lora_merge_cli.reports.words import (
    alphas_in_words,
    byte_size,
    counted,
    figure,
    mixing_in_words,
    model_name,
    quantity,
    sweep_in_words,
)

_MOST_LEAVES = 12
_MOST_PARTS = 3
_STATUS_STYLES = {"planned": "dim", "written": "green", "kept": "cyan", "failed": "bold red"}


def print_interpolation(report: InterpolateReport) -> None:
    """A dry run, or a finished interpolation at one alpha."""
    console = stdout_console()
    console.print(f"{_verdict(report)}: {shown(mixing_in_words(report.mixing))}", overflow="fold")
    if report.status == "planned":
        print_planned_sites(console, report)
    else:
        print_written_sites(console, report)
        print_heatmaps(console, report)
    print_rounding(console, report)
    _print_parts(console, report)
    _print_mixed(console, report.mixed)
    console.print()
    if report.mixed:
        console.print(f"{counted(len(report.mixed), 'leaf', 'leaves')} without factors interpolated")
    print_changes(console, report)
    if report.status == "planned":
        print_needs(console, report)
    if report.checks:
        console.print()
        print_checks(console, report.checks)
    _print_not_interpolated(console, report.not_interpolated)
    print_lines(console, "warning", report.warnings, "bold yellow")
    print_lines(console, "note", report.notes, "dim")
    if report.status == "interpolated":
        print_written(console, report)


def _verdict(report: InterpolateReport) -> str:
    if report.status == "planned":
        return f"[bold]to interpolate{_of(report)}[/bold] (dry run, nothing written)"
    return f"{'[bold red]rejected' if report.failed else '[bold green]interpolated'}[/]{_of(report)}"


def _print_parts(console: Console, report: InterpolateReport) -> None:
    if not report.parts:
        return
    console.print()
    table = plain_table("part", ">leaves", ">parameters", ">alpha", ">wanted", ">moved", ">stored", ">served")
    for part in report.parts:
        table.add_row(
            shown(part.part),
            str(part.leaves),
            quantity(part.parameters),
            alphas_in_words(part.alphas),
            figure(_relative(part, part.wanted)),
            figure(_relative(part, part.distance)),
            figure(part.gain_stored),
            figure(part.gain_served),
        )
    console.print(table)
    console.print(
        "[dim]wanted, moved: how far from the base before rounding and as stored, as a share of the base's norm; stored, "
        f"served: the share of the wanted change that is there as stored and in {escape(report.serving_dtype)}[/dim]"
    )


def _print_mixed(console: Console, mixed: Sequence[MixedRecord]) -> None:
    """The leaves without a site that moved most."""
    moved = [leaf for leaf in mixed if leaf.relative_norm]
    if not moved:
        return
    console.print()
    nearest = has_nearest(mixed)
    table = plain_table("leaf without factors", ">alpha", ">|d|/|w|", ">stored", ">served", *[">nearest"][:nearest])
    for leaf in sorted(moved, key=lambda leaf: leaf.relative_norm or 0, reverse=True)[:_MOST_LEAVES]:
        gains = [survival.gain for survival in leaf.survival]
        stored, served = (gains[0], gains[-1]) if gains else (None, None)
        to_nearest = figure(leaf.nearest.gain if leaf.nearest else None)
        table.add_row(
            shown(leaf.path),
            alphas_in_words(leaf.alphas),
            *map(figure, (leaf.relative_norm, stored, served)),
            *[to_nearest][:nearest],
        )
    console.print(table)
    if nearest:
        console.print("[dim]nearest: the share of the change that rounding to nearest would have kept[/dim]")
    if len(moved) > _MOST_LEAVES:
        console.print(f"[dim]and {len(moved) - _MOST_LEAVES} more that moved less: --json, or --report[/dim]")


def _print_not_interpolated(console: Console, names: Sequence[str]) -> None:
    if names:
        console.print(
            f"[bold yellow]not interpolated:[/bold yellow] {counted(len(names), 'leaf', 'leaves')} that the fine-tune trained, "
            f"its own at every alpha: {shown(first_names(names, 3))}",
            overflow="fold",
        )


def print_sweep(report: SweepReport) -> None:
    """A dry run, or a finished interpolation at several alphas."""
    console = stdout_console()
    console.print(f"{_sweep_verdict(report)}: {shown(sweep_in_words(report))}", overflow="fold")
    parts = _parts_that_move_most(report.points)
    console.print(_points(report.points, parts))
    if parts:
        _print_sweep_legend(console, report, parts)
    print_rounding(console, report)
    failed = [f"alpha {point.alpha:g}: {point.error}" for point in report.points if point.status == "failed"]
    print_lines(console, "failed", failed, "bold red")
    print_lines(console, "warning", report.warnings, "bold yellow")
    print_lines(console, "note", report.notes, "dim")
    if report.status != "planned" and report.output and report.seconds is not None:
        size = sum(point.bytes_on_disk or 0 for point in report.points)
        console.print(
            f"[bold]{escape(report.output)}[/bold]  {byte_size(size)} in {report.seconds:.1f} s, "
            f"peak {byte_size(report.peak_rss_bytes or 0)}",
            overflow="fold",
        )


def _sweep_verdict(report: SweepReport) -> str:
    if report.status == "planned":
        return f"[bold]to interpolate{_of(report)}[/bold] (dry run, nothing written)"
    done = sum(point.status != "failed" for point in report.points)
    style = "bold green" if report.status == "complete" else "bold red"
    return f"[{style}]{done} of {counted(len(report.points), 'output')} interpolated[/{style}]{_of(report)}"


def _points(points: Sequence[PointRecord], parts: Sequence[str]) -> Table:
    measured = any(point.least_gain_stored is not None for point in points)
    gains = [">least\nstored", ">least\nserved"] if measured else []
    # A heading of two lines leaves room for one more part.
    names = [f">{shown(part)}".replace(" ", "\n", 1) for part in parts]
    sized = any(point.bytes_on_disk is not None for point in points)
    table = plain_table(">alpha", *names, *gains, *([">size"] if sized else []), "status")
    for point in points:
        moved = {part.part: _relative(part, part.distance) for part in point.parts}
        style = _STATUS_STYLES[point.status]
        table.add_row(
            f"{point.alpha:g}",
            *(figure(moved.get(part)) for part in parts),
            *((figure(point.least_gain_stored), figure(point.least_gain_served)) if measured else ()),
            *(["-" if point.bytes_on_disk is None else byte_size(point.bytes_on_disk)] if sized else []),
            f"[{style}]{point.status}[/{style}]",
        )
    return table


def _print_sweep_legend(console: Console, report: SweepReport, parts: Sequence[str]) -> None:
    others = len({part.part for point in report.points for part in point.parts}) - len(parts)
    more = f"; {counted(others, 'more part')}: --json, or --report x.html" if others else ""
    console.print(f"[dim]of a part: |W - W_base| / |W_base| as stored{more}[/dim]")
    if any(point.least_gain_stored is not None for point in report.points):
        console.print(
            "[dim]least stored, served: the least share of a delta that an input which its adapter reacts to sees as stored "
            f"and in {escape(report.serving_dtype)}; 1 is all[/dim]"
        )


def _parts_that_move_most(points: Sequence[PointRecord]) -> list[str]:
    """The parts that some output moves, those that move most if there are many, in the report's order."""
    furthest: dict[str, float] = {}
    for part in (part for point in points for part in point.parts):
        furthest[part.part] = max(furthest.get(part.part, 0.0), _relative(part, part.distance) or 0.0)
    moved = [part for part in furthest if furthest[part]]
    most = sorted(moved, key=lambda part: furthest[part], reverse=True)[:_MOST_PARTS]
    return [part for part in moved if part in most]


def _of(report: InterpolateReport | SweepReport) -> str:
    """The model, where it is known, as the end of a phrase."""
    name = model_name(report)
    return f" {shown(name)}" if name else ""


def _relative(part: PartRecord, norm: float) -> float | None:
    return norm / part.base_norm if part.base_norm else None
