"""An extraction for people."""

from __future__ import annotations

from rich.markup import escape

from lora_merge_cli._cli.console import plain_table, print_lines, shown, stdout_console
from lora_merge_cli.extract_report import ExtractedSite, ExtractReport
from lora_merge_cli.reports.kinds import MOST_KINDS, kinds, largest, least, spread
from lora_merge_cli.reports.markdown_extract import sizes
from lora_merge_cli.reports.words import byte_size, counted, figure


def print_extraction(report: ExtractReport) -> None:
    """A dry run, or a finished extraction."""
    console = stdout_console()
    done = "[bold green]extracted[/bold green]" if report.status == "extracted" else "[bold]to extract[/bold] (dry run)"
    name = "" if report.model == "unknown" else f" of {escape(report.model)}"
    how = "bit for bit" if report.kind == "exact" else f"truncated, for {report.adapter_format}"
    console.print(f"{done} {counted(len(report.sites), 'adapter')}{name}, {how}")
    table = plain_table("site", "layers", ">rank", ">scale", ">energy", ">error", ">size")
    rows = kinds(report.sites, lambda site: site.label, lambda site: (site.group, site.scale), lambda site: site.group)
    for kind in rows[:MOST_KINDS]:
        members: tuple[ExtractedSite, ...] = kind.members
        sized = [site.nbytes for site in members if site.nbytes is not None]
        table.add_row(
            shown(kind.counted),
            kind.layers,
            spread(site.rank for site in members if site.rank is not None) or "-",
            spread((site.scale for site in members), "*" if any(site.scale_assumed for site in members) else ""),
            figure(least(site.energy_kept for site in members)),
            figure(largest(site.relative_error for site in members)),
            byte_size(sum(sized)) if sized else "-",
        )
    if len(rows) > MOST_KINDS:
        table.add_row(f"[dim]and {len(rows) - MOST_KINDS} more[/dim]")
    console.print(table)
    console.print()
    checked = "compared with the base" if report.frozen_checked else "not compared with a base"
    console.print(f"{counted(report.frozen, 'leaf', 'leaves')} as in the base, {checked}")
    console.print(sizes(report))
    print_lines(console, "warning", report.warnings, "bold yellow")
    print_lines(console, "note", report.notes, "dim")
    if report.output and report.bytes_on_disk is not None and report.seconds is not None:
        console.print(
            f"[bold]{escape(report.output)}[/bold]  {byte_size(report.bytes_on_disk)} in {report.seconds:.1f} s, "
            f"peak {byte_size(report.peak_rss_bytes or 0)}",
            overflow="fold",
        )
