"""An inspection for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_merge_cli._cli.console import plain_table, print_lines, shown, starred, stdout_console
from lora_merge_cli._cli.kind_tables import print_adapter_heading, print_by_kind_hint, print_scale_sources, with_rest
from lora_merge_cli._cli.show_adapter import print_adapter, print_adapter_alone
from lora_merge_cli.inspection import BaseRow, Inspection, SiteRow
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
from lora_merge_cli.reports.words import STATUS_WORDS, byte_size, counted, figure, quantity

if TYPE_CHECKING:
    from lora_merge_cli.measurement import SiteStats

_KEPT = "kept"
_NOT_FINITE = "NaN"


def print_inspection(found: Inspection) -> None:
    """An `Inspection` for people."""
    console = stdout_console()
    alone = found.adapters[0] if found.adapters and not found.groups else None
    step = "" if found.step is None else f", step {found.step}"
    model = "checkpoint" if found.model == "unknown" else found.model
    console.print(f"[bold]{model}[/bold] ({found.format}, {found.dialect}{step})")
    console.print(escape(found.path), overflow="fold")
    dtypes = ", ".join(f"{byte_size(size)} {name}" for name, size in found.dtypes)
    console.print(
        f"{quantity(found.parameters)} parameters in {counted(found.leaves, 'leaf', 'leaves')}, {byte_size(found.nbytes)} ({dtypes})"
    )
    inside = found.adapter_parameters - sum(adapter.parameters for adapter in found.adapters)
    if inside:
        console.print(f"{quantity(inside)} of them are adapters")
    if alone is not None:
        print_adapter_alone(console, alone)
    else:
        for number, adapter in enumerate(found.adapters):
            print_adapter(console, adapter, number + 1 if len(found.adapters) > 1 else None, found.notes)
        if found.sites:
            _print_sites(console, found)
        console.print(_group_table(found))
    if found.base:
        _print_base(console, found.base)
    _print_assets(console, found)
    print_lines(console, "warning", found.warnings, "bold yellow")
    print_lines(console, "note", found.notes, "dim")
    print_lines(console, "would be refused", found.problems, "bold red")
    console.print("\n[bold]Next[/bold]")
    for line in found.advice:
        console.print(f"  {escape(line)}", soft_wrap=line.startswith("lora-merge"))


def _print_sites(console: Console, found: Inspection) -> None:
    by_kind = len(found.sites) > MANY_SITES
    table_of = _kinds_table if by_kind else _sites_table
    if len(found.adapters) < 2:
        console.print()
        console.print(table_of(found.sites))
    for number, adapter in enumerate(found.adapters if len(found.adapters) > 1 else ()):
        console.print()
        print_adapter_heading(console, number + 1, adapter.path, adapter.weight)
        console.print(table_of([site for site in found.sites if site.adapter == number]))
    if by_kind:
        if any(site.stats for site in found.sites):
            console.print(
                "[dim]|d|/|w|: the median of a row's sites; worst: the largest; eff.rank, kept: the least[/dim]"
            )
        print_by_kind_hint(console, "--json")
    _print_nearest_legend(console, found.sites)
    print_scale_sources(console, found.sites, len(found.adapters))
    console.print()


def _print_nearest_legend(console: Console, sites: Sequence[SiteRow]) -> None:
    """What the column of estimates says, and how far to trust it."""
    found = [nearest for site in sites if site.stats is not None for nearest in site.stats.nearest]
    if not found:
        return
    dtypes = " or ".join(dict.fromkeys(nearest.dtype for nearest in found))
    error = max(nearest.standard_error for nearest in found)
    sampled = f"; estimated from samples, standard error up to {figure(error)}" if error else ""
    console.print(
        f"[dim]kept: the share of all that is added to a kernel that rounding to nearest {dtypes} keeps; 1 is all{sampled}[/dim]"
    )


def _measured_columns(sites: Sequence[SiteRow]) -> list[str]:
    """The headings of what is measured. 80 columns have no room for what there is nothing to say of."""
    stats = [site.stats for site in sites if site.stats is not None]
    kept = [f">{_KEPT}"] if any(found.nearest for found in stats) else []
    bad = [f">{_NOT_FINITE}"] if any(found.non_finite for found in stats) or not kept else []
    return [">|d|/|w|", ">worst", ">eff.rank", *bad, *kept]


def _measured(stats: Sequence[SiteStats], columns: Sequence[str]) -> list[str]:
    """What was measured of one site, or of those that share a row."""
    row = [
        figure(middle(found.relative_norm for found in stats)),
        figure(largest(found.relative_norm_worst for found in stats)),
        f"{min(found.effective_rank for found in stats):.1f}",
    ]
    if f">{_NOT_FINITE}" in columns:
        row.append(str(sum(found.non_finite for found in stats)))
    if f">{_KEPT}" in columns:
        row.append(figure(least(nearest.gain for found in stats for nearest in found.nearest)))
    return row


def _sites_table(sites: Sequence[SiteRow]) -> Table:
    measured = any(site.stats for site in sites)
    # Either fits 80 columns; both together do not.
    more = _measured_columns(sites) if measured else ["equation"]
    stacked = any(site.layers for site in sites)
    table = plain_table("site", ">rank", *([">layers"] if stacked else []), ">scale", *more)
    for site in sites:
        row = [shown(site.label), str(site.rank), *([str(site.layers or "-")] if stacked else []), starred(site)]
        if site.stats is None:
            row += ["-"] * len(more) if measured else [site.equation]
        else:
            row += _measured([site.stats], more)
        table.add_row(*row)
    return table


def _kinds_table(sites: Sequence[SiteRow]) -> Table:
    measured = any(site.stats for site in sites)
    more = _measured_columns(sites) if measured else ["equation"]
    table = plain_table("sites", ">layers", ">rank", ">scale", *more)
    rows = site_kinds(sites)
    for kind in rows[:MOST_KINDS]:
        row = [shown(kind.counted), kind.layers, rank_spread(kind.members), scale_spread(kind.members, "*")]
        stats = [site.stats for site in kind.members if site.stats is not None]
        if stats:
            row += _measured(stats, more)
        elif measured:
            row += ["-"] * len(more)
        else:
            row.append(", ".join(dict.fromkeys(site.equation for site in kind.members)))
        table.add_row(*row)
    return with_rest(table, rows)


def _group_table(found: Inspection) -> Table:
    table = plain_table("part", "status", ">leaves", ">parameters", ">bytes")
    for row in found.groups:
        table.add_row(
            row.part,
            STATUS_WORDS.get(row.status, row.status),
            str(row.leaves),
            quantity(row.parameters),
            byte_size(row.nbytes),
        )
    return table


def _print_base(console: Console, rows: Sequence[BaseRow]) -> None:
    counts = Counter(row.status for row in rows)
    summary = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    console.print(f"\n[bold]against the base[/bold]: {summary}")
    table = plain_table("leaf that is not the base's", "status", ">|change|/|base|")
    for row in rows:
        if row.status not in ("frozen", "adapter"):
            table.add_row(escape(row.path), row.status, figure(row.relative_change))
    console.print(table)


def _print_assets(console: Console, found: Inspection) -> None:
    assets = found.assets
    if assets.asset_ids and not assets.problems:
        console.print(f"\nassets: norm stats of {', '.join(assets.asset_ids)}, sane")
    elif found.model != "unknown" or assets.files:
        print_lines(console, "assets", assets.problems, "bold yellow")
