"""A merge for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from lora_merge_cli._cli.console import plain_table, print_lines, starred, stdout_console
from lora_merge_cli._cli.heatmap import print_heatmaps
from lora_merge_cli._cli.show_checks import print_checks
from lora_merge_cli.report import MergeReport, SiteRecord
from lora_merge_cli.reports.words import byte_size, figure, survival_for


def print_merge(report: MergeReport) -> None:
    """A dry run, or a finished merge."""
    (_print_plan if report.status == "planned" else _print_result)(report)


def _print_plan(report: MergeReport) -> None:
    """A dry run for people."""
    console = stdout_console()
    console.print(f"[bold]{report.model}: {len(report.sites)} adapters to merge[/bold] (dry run, nothing written)")
    _print_report_sites(console, report.sites)
    _print_changes(console, report)
    console.print(
        f"to write: up to {byte_size(report.output_bytes)}; peak memory: about {byte_size(report.peak_bytes_planned)}"
    )
    print_lines(console, "warning", report.warnings, "bold yellow")
    print_lines(console, "note", report.notes, "dim")


def _print_result(report: MergeReport) -> None:
    """A finished merge for people."""
    console = stdout_console()
    verdict = "[bold red]rejected[/bold red]" if report.failed else "[bold green]merged[/bold green]"
    console.print(f"{verdict} {len(report.sites)} adapters of {report.model}")
    table = plain_table("site", ">rank", ">scale", ">|d|/|w|", ">max|d|", ">stored", ">served")
    for site in report.sites:
        stored, served = (survival_for(site, d) for d in (site.dtype, report.serving_dtype))
        table.add_row(
            escape(site.label),
            str(site.rank),
            starred(site),
            figure(site.relative_norm),
            figure(site.max_abs),
            *(figure(s.gain_along_inputs if s else None) for s in (stored, served)),
        )
    console.print(table)
    stored_as = ", ".join(sorted({site.dtype for site in report.sites}))
    console.print(
        f"[dim]stored, served: the share of each delta that an input which the adapter reacts to sees in "
        f"{stored_as} and in {report.serving_dtype}; 1 is all[/dim]"
    )
    print_heatmaps(console, report)
    console.print()
    _print_changes(console, report)
    if report.checks:
        console.print()
        print_checks(console, report.checks)
    print_lines(console, "warning", report.warnings, "bold yellow")
    print_lines(console, "note", report.notes, "dim")
    if report.status == "merged" and report.output and report.bytes_on_disk is not None and report.seconds is not None:
        console.print(
            f"[bold]{escape(report.output)}[/bold]  {byte_size(report.bytes_on_disk)} in {report.seconds:.1f} s, "
            f"peak {byte_size(report.peak_rss_bytes or 0)}",
            overflow="fold",
        )


def _print_report_sites(console: Console, sites: Sequence[SiteRecord]) -> None:
    table = plain_table("site", ">rank", "equation", ">scale", "stored as")
    for site in sites:
        stored = site.dtype if site.dtype == site.source_dtype else f"{site.source_dtype} > {site.dtype}"
        table.add_row(escape(site.label), str(site.rank), site.equation, starred(site), stored)
    console.print(table)
    for group, source in dict.fromkeys((site.group, site.scale_source) for site in sites):
        console.print(f"[dim]{group}: {escape(source)}[/dim]")


def _print_changes(console: Console, report: MergeReport) -> None:
    origins = Counter(leaf.origin for leaf in report.copied)
    for origin, count in sorted(origins.items()):
        console.print(f"{count} leaves {origin}")
    for reason, count in Counter(leaf.reason for leaf in report.dropped).items():
        console.print(f"{count} dropped: {escape(reason)}")
