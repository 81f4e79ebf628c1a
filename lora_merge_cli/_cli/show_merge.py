"""A merge for people."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.markup import escape

from lora_merge_cli._cli.console import print_lines, shown, stdout_console
from lora_merge_cli._cli.heatmap import print_heatmaps
from lora_merge_cli._cli.show_checks import print_checks
from lora_merge_cli._cli.show_rounding import print_rounding
from lora_merge_cli._cli.site_tables import print_planned_sites, print_written_sites
from lora_merge_cli.records import first_names
from lora_merge_cli.report import MergeReport, OutputReport
from lora_merge_cli.reports.words import (
    adapters_in_words,
    beside,
    brought,
    byte_size,
    counted,
    model_name,
    untouched,
    why,
)


def print_merge(report: MergeReport) -> None:
    """A dry run, or a finished merge."""
    (_print_plan if report.status == "planned" else _print_result)(report)


def _print_plan(report: MergeReport) -> None:
    """A dry run for people."""
    console = stdout_console()
    name = model_name(report)
    what = f"{adapters_in_words(report)} to merge"
    console.print(f"[bold]{f'{escape(name)}: {what}' if name else what}[/bold] (dry run, nothing written)")
    print_planned_sites(console, report)
    print_rounding(console, report)
    print_changes(console, report)
    print_needs(console, report)
    print_lines(console, "warning", report.warnings, "bold yellow")
    print_lines(console, "note", report.notes, "dim")


def _print_result(report: MergeReport) -> None:
    """A finished merge for people."""
    console = stdout_console()
    verdict = "[bold red]rejected[/bold red]" if report.failed else "[bold green]merged[/bold green]"
    name, joint = model_name(report), "into" if beside(report) else "of"
    console.print(f"{verdict} {adapters_in_words(report)}{f' {joint} {escape(name)}' if name else ''}")
    print_written_sites(console, report)
    print_heatmaps(console, report)
    print_rounding(console, report)
    console.print()
    print_changes(console, report)
    if report.checks:
        console.print()
        print_checks(console, report.checks)
    print_lines(console, "warning", report.warnings, "bold yellow")
    print_lines(console, "note", report.notes, "dim")
    if report.status == "merged":
        print_written(console, report)


def print_changes(console: Console, report: OutputReport) -> None:
    """What became of the leaves without a site, and of what the output does not have."""
    for origin, count in sorted(Counter(leaf.origin for leaf in untouched(report.copied)).items()):
        console.print(f"{count} leaves {origin}")
    reasons: dict[tuple[str, str], list[str]] = {}
    for leaf in brought(report.copied):
        reasons.setdefault((leaf.origin, why(leaf)), []).append(leaf.path)
    for (origin, reason), paths in sorted(reasons.items()):
        console.print(
            f"[bold]{counted(len(paths), 'leaf', 'leaves')} {origin}[/bold]: {shown(reason)} ({shown(first_names(paths, 3))})",
            overflow="fold",
        )
    for reason, count in Counter(leaf.reason for leaf in report.dropped).items():
        console.print(f"{count} dropped: {escape(reason)}")


def print_needs(console: Console, report: OutputReport) -> None:
    """What a run of this plan takes."""
    console.print(
        f"to write: up to {byte_size(report.output_bytes)}; peak memory: about {byte_size(report.peak_bytes_planned)}"
    )


def print_written(console: Console, report: OutputReport) -> None:
    """The line of a finished output."""
    if report.output and report.bytes_on_disk is not None and report.seconds is not None:
        # Nobody knows it of an output that an earlier run wrote.
        peak = "" if report.peak_rss_bytes is None else f", peak {byte_size(report.peak_rss_bytes)}"
        console.print(
            f"[bold]{escape(report.output)}[/bold]  {byte_size(report.bytes_on_disk)} in {report.seconds:.1f} s{peak}",
            overflow="fold",
        )
