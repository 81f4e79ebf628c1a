"""A merge for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_merge_cli._cli.console import plain_table, print_lines, shown, starred, stdout_console
from lora_merge_cli._cli.heatmap import print_heatmaps
from lora_merge_cli._cli.kind_tables import print_adapter_heading, print_by_kind_hint, print_scale_sources, with_rest
from lora_merge_cli._cli.show_checks import print_checks
from lora_merge_cli.records import first_names
from lora_merge_cli.report import MergeReport, SiteRecord
from lora_merge_cli.reports.kinds import (
    MANY_SITES,
    MOST_KINDS,
    largest,
    least,
    middle,
    rank_spread,
    scale_spread,
    site_kinds,
)
from lora_merge_cli.reports.words import (
    adapters_in_words,
    beside,
    brought,
    byte_size,
    counted,
    figure,
    gain_along_inputs,
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
    _print_by_adapter(console, report, _planned_sites)
    print_scale_sources(console, report.sites, len(beside(report)))
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
    name, joint = model_name(report), "into" if beside(report) else "of"
    console.print(f"{verdict} {adapters_in_words(report)}{f' {joint} {escape(name)}' if name else ''}")
    _print_by_adapter(console, report, _merged_sites)
    if report.sites:
        _print_legend(console, report)
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


def _print_by_adapter(
    console: Console, report: MergeReport, table_of: Callable[[Sequence[SiteRecord], MergeReport, bool], Table]
) -> None:
    """A table of all sites, or one for each of several adapters; by kind where there are many sites."""
    adapters = beside(report)
    by_kind = len(report.sites) > MANY_SITES
    if len(adapters) < 2 and report.sites:
        console.print(table_of(report.sites, report, by_kind))
    for number, source in enumerate(adapters if len(adapters) > 1 else ()):
        console.print()
        print_adapter_heading(console, number + 1, source.path, source.weight)
        sites = [site for site in report.sites if site.adapter == number]
        console.print(table_of(sites, report, by_kind) if sites else "no sites")
    if by_kind:
        print_by_kind_hint(console, "--json, or --report x.html,")


def _planned_sites(sites: Sequence[SiteRecord], report: MergeReport, by_kind: bool) -> Table:  # noqa: ARG001
    def stored(site: SiteRecord) -> str:
        return site.dtype if site.dtype == site.source_dtype else f"{site.source_dtype} > {site.dtype}"

    if not by_kind:
        table = plain_table("site", ">rank", "equation", ">scale", "stored as")
        for site in sites:
            table.add_row(shown(site.label), str(site.rank), site.equation, starred(site), stored(site))
        return table
    table = plain_table("sites", ">layers", ">rank", ">scale", "stored as")
    rows = site_kinds(sites)
    for kind in rows[:MOST_KINDS]:
        kept = ", ".join(dict.fromkeys(map(stored, kind.members)))
        table.add_row(
            shown(kind.counted), kind.layers, rank_spread(kind.members), scale_spread(kind.members, "*"), kept
        )
    return with_rest(table, rows)


def _merged_sites(sites: Sequence[SiteRecord], report: MergeReport, by_kind: bool) -> Table:
    if not by_kind:
        table = plain_table("site", ">rank", ">scale", ">|d|/|w|", ">max|d|", ">stored", ">served")
        for site in sites:
            table.add_row(
                shown(site.label),
                str(site.rank),
                starred(site),
                figure(site.relative_norm),
                figure(site.max_abs),
                *(figure(gain_along_inputs(site, dtype)) for dtype in (site.dtype, report.serving_dtype)),
            )
        return table
    table = plain_table("sites", ">layers", ">rank", ">scale", ">|d|/|w|", ">most", ">stored", ">served")
    rows = site_kinds(sites)
    for kind in rows[:MOST_KINDS]:
        norms = [site.relative_norm for site in kind.members]
        table.add_row(
            shown(kind.counted),
            kind.layers,
            rank_spread(kind.members),
            scale_spread(kind.members, "*"),
            figure(middle(norms)),
            figure(largest(norms)),
            figure(least(gain_along_inputs(site, site.dtype) for site in kind.members)),
            figure(least(gain_along_inputs(site, report.serving_dtype) for site in kind.members)),
        )
    return with_rest(table, rows)


def _print_legend(console: Console, report: MergeReport) -> None:
    dtypes = list(dict.fromkeys([*sorted({site.dtype for site in report.sites}), report.serving_dtype]))
    stored_as = ", ".join(sorted({site.dtype for site in report.sites}))
    both = stored_as if len(dtypes) == 1 else f"{stored_as} and in {report.serving_dtype}"
    if len(report.sites) > MANY_SITES:
        console.print("[dim]of a row: |d|/|w| the median, most the largest of them, stored, served the least[/dim]")
    console.print(
        f"[dim]stored, served: the share of each delta that an input which the adapter reacts to sees in {both}; "
        "1 is all[/dim]"
    )
    if len(beside(report)) > 1:
        console.print("[dim]the figures of a kernel are of all adapters on it together[/dim]")


def _print_changes(console: Console, report: MergeReport) -> None:
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
