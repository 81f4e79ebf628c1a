"""What tables of kinds of sites have in common, and tables of several adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.table import Table

from lora_merge_cli._cli.console import shown
from lora_merge_cli.reports.kinds import MOST_KINDS, Kind, source_pattern

if TYPE_CHECKING:
    from lora_merge_cli.inspection import SiteRow
    from lora_merge_cli.report import SiteRecord

MOST_SOURCES = 12

T = TypeVar("T")


def with_rest(table: Table, rows: Sequence[Kind[T]]) -> Table:
    """The table with a last row that says how many it leaves out, if any."""
    if len(rows) > MOST_KINDS:
        left_out = sum(len(kind.members) for kind in rows[MOST_KINDS:])
        table.add_row(f"[dim]and {left_out} more[/dim]")
    return table


def print_by_kind_hint(console: Console, flags: str) -> None:
    """Say where every site is told of."""
    console.print(f"[dim]sites that are alike share a row: {flags} has each of them[/dim]")


def print_adapter_heading(console: Console, number: int | None, path: str, weight: float | None) -> None:
    """One of the adapters: its number among several, its path, and its weight if it is not 1."""
    name = "adapter" if number is None else f"adapter {number}"
    at = "" if weight in (None, 1) else f" at weight {weight:g}"
    console.print(f"[bold]{name}[/bold]: {shown(path)}[bold]{at}[/bold]", overflow="fold")


def print_scale_sources(console: Console, sites: Sequence[SiteRow] | Sequence[SiteRecord], adapters: int) -> None:
    """Who says what the scales are.

    Args:
        console: Where to.
        sites: The sites.
        adapters: How many adapters lie beside the checkpoint.
    """

    def owner(site: SiteRow | SiteRecord) -> str:
        if site.adapter is None:
            return site.group
        return "scale" if adapters == 1 else f"scale of adapter {site.adapter + 1}"

    lines = list(dict.fromkeys((owner(site), source_pattern(site.scale_source)) for site in sites))
    for name, source in lines[:MOST_SOURCES]:
        console.print(f"[dim]{shown(name)}: {shown(source)}[/dim]")
    if len(lines) > MOST_SOURCES:
        console.print(f"[dim]and {len(lines) - MOST_SOURCES} more[/dim]")
