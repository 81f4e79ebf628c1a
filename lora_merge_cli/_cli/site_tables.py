"""The sites of what writes a checkpoint: as planned, and as written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from lora_merge_cli._cli.console import plain_table, shown, starred
from lora_merge_cli._cli.kind_tables import print_adapter_heading, print_by_kind_hint, print_scale_sources, with_rest
from lora_merge_cli.report import OutputReport, SiteRecord
from lora_merge_cli.reports.kinds import (
    MANY_SITES,
    MOST_KINDS,
    Kind,
    largest,
    least,
    middle,
    rank_spread,
    scale_spread,
    site_kinds,
    spread,
)
from lora_merge_cli.reports.words import alphas_in_words, beside, figure, gain_along_inputs


def print_planned_sites(console: Console, report: OutputReport) -> None:
    """Every site before its kernel is computed, and who says what the scales are."""
    _print_by_adapter(console, report, _planned_table)
    print_scale_sources(console, report.sites, len(beside(report)))


def print_written_sites(console: Console, report: OutputReport) -> None:
    """Every site with what became of its delta."""
    _print_by_adapter(console, report, _written_table)
    if report.sites:
        _print_legend(console, report)


def _print_by_adapter(
    console: Console, report: OutputReport, table_of: Callable[[Sequence[SiteRecord], OutputReport, bool], Table]
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


def _planned_table(sites: Sequence[SiteRecord], report: OutputReport, by_kind: bool) -> Table:
    def stored(site: SiteRecord) -> str:
        return site.dtype if site.dtype == site.source_dtype else f"{site.source_dtype} > {site.dtype}"

    alpha = _alpha_column(report)
    if not by_kind:
        table = plain_table("site", ">rank", "equation", ">scale", *alpha, "stored as")
        for site in sites:
            mixed = [alphas_in_words(site.alphas)] if alpha else []
            table.add_row(shown(site.label), str(site.rank), site.equation, starred(site), *mixed, stored(site))
        return table
    table = plain_table("sites", ">layers", ">rank", ">scale", *alpha, "stored as")
    rows = site_kinds(sites)
    for kind in rows[:MOST_KINDS]:
        kept = ", ".join(dict.fromkeys(map(stored, kind.members)))
        table.add_row(*_of_kind(kind), *([_alpha_spread(kind)] if alpha else []), kept)
    return with_rest(table, rows)


def _written_table(sites: Sequence[SiteRecord], report: OutputReport, by_kind: bool) -> Table:
    alpha = _alpha_column(report)
    if not by_kind:
        table = plain_table("site", ">rank", ">scale", *alpha, ">|d|/|w|", ">max|d|", ">stored", ">served")
        for site in sites:
            table.add_row(
                shown(site.label),
                str(site.rank),
                starred(site),
                *([alphas_in_words(site.alphas)] if alpha else []),
                figure(site.relative_norm),
                figure(site.max_abs),
                *(figure(gain_along_inputs(site, dtype)) for dtype in (site.dtype, report.serving_dtype)),
            )
        return table
    table = plain_table("sites", ">layers", ">rank", ">scale", *alpha, ">|d|/|w|", ">most", ">stored", ">served")
    rows = site_kinds(sites)
    for kind in rows[:MOST_KINDS]:
        norms = [site.relative_norm for site in kind.members]
        table.add_row(
            *_of_kind(kind),
            *([_alpha_spread(kind)] if alpha else []),
            figure(middle(norms)),
            figure(largest(norms)),
            figure(least(gain_along_inputs(site, site.dtype) for site in kind.members)),
            figure(least(gain_along_inputs(site, report.serving_dtype) for site in kind.members)),
        )
    return with_rest(table, rows)


def _of_kind(kind: Kind[SiteRecord]) -> list[str]:
    return [shown(kind.counted), kind.layers, rank_spread(kind.members), scale_spread(kind.members, "*")]


def _alpha_column(report: OutputReport) -> list[str]:
    """The heading of the alphas, where not all sites have the same one."""
    return [">alpha"] if len({alpha for site in report.sites for alpha in site.alphas}) > 1 else []


def _alpha_spread(kind: Kind[SiteRecord]) -> str:
    return spread(alpha for site in kind.members for alpha in site.alphas)


def _print_legend(console: Console, report: OutputReport) -> None:
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
