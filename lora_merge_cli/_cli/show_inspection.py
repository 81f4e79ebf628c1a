"""An inspection for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_merge_cli._cli.console import plain_table, print_lines, starred, stdout_console
from lora_merge_cli.inspection import BaseRow, Inspection, SiteRow
from lora_merge_cli.reports.words import STATUS_WORDS, byte_size, figure, quantity


def print_inspection(found: Inspection) -> None:
    """An `Inspection` for people."""
    console = stdout_console()
    step = "" if found.step is None else f", step {found.step}"
    console.print(f"[bold]{found.model}[/bold] ({found.format}, {found.dialect}{step})")
    console.print(escape(found.path), overflow="fold")
    dtypes = ", ".join(f"{byte_size(size)} {name}" for name, size in found.dtypes)
    console.print(
        f"{quantity(found.parameters)} parameters in {found.leaves} leaves, {byte_size(found.nbytes)} ({dtypes})"
    )
    if found.adapter_parameters:
        console.print(f"{quantity(found.adapter_parameters)} of them are adapters")
    if found.sites:
        _print_sites(console, found.sites)
    console.print(_group_table(found))
    if found.base:
        _print_base(console, found.base)
    _print_assets(console, found)
    print_lines(console, "note", found.notes, "dim")
    print_lines(console, "would be refused", found.problems, "bold red")
    console.print("\n[bold]Next[/bold]")
    for line in found.advice:
        console.print(f"  {escape(line)}", soft_wrap=line.startswith("lora-merge"))


def _print_sites(console: Console, sites: Sequence[SiteRow]) -> None:
    measured = any(site.stats for site in sites)
    # Either fits 80 columns; both together do not.
    more = [">|d|/|w|", ">worst", ">eff.rank", ">NaN"] if measured else ["equation"]
    table = plain_table("site", ">rank", ">layers", ">scale", *more)
    for site in sites:
        row = [escape(site.label), str(site.rank), str(site.layers or "-"), starred(site)]
        if site.stats is None:
            row.append(site.equation)
        else:
            norms = (site.stats.relative_norm, site.stats.relative_norm_worst)
            row += [*map(figure, norms), f"{site.stats.effective_rank:.1f}", str(site.stats.non_finite)]
        table.add_row(*row)
    console.print()
    console.print(table)
    sources = dict.fromkeys((site.group, site.scale_source) for site in sites)
    for group, source in sources:
        console.print(f"[dim]{group}: {escape(source)}[/dim]")
    console.print()


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
    if not assets.problems:
        console.print(f"\nassets: norm stats of {', '.join(assets.asset_ids)}, sane")
    elif found.model != "unknown" or assets.files:
        print_lines(console, "assets", assets.problems, "bold yellow")
