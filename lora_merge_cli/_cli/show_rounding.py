"""A choice of rounding for people: what it was, and survival with rounding to nearest beside survival with it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from lora_merge_cli._cli.console import plain_table, shown
from lora_merge_cli.report import ModelReport, SweepReport
from lora_merge_cli.reports.kinds import MANY_SITES, MOST_KINDS
from lora_merge_cli.reports.rounding_rows import WORTH_FROM, RoundedRow, rounded_rows, rounding_in_words, share_in_words
from lora_merge_cli.reports.words import figure


def print_rounding(console: Console, report: ModelReport | SweepReport) -> None:
    """The line that says who got what, and before and after by site; nothing where all is rounded to nearest."""
    words = rounding_in_words(report)
    if report.rounding is None or words is None:
        return
    console.print()
    console.print(f"[bold]rounding[/bold]: {shown(words)}", overflow="fold")
    if isinstance(report, ModelReport) and (rows := rounded_rows(report)):
        _print_rows(console, rows, report.rounding.method, by_kind=len(report.sites) > MANY_SITES)


def _print_rows(console: Console, rows: Sequence[RoundedRow], method: str, *, by_kind: bool) -> None:
    wide = any(row.moved is not None for row in rows)
    heads = [">gain to\nnearest", f">gain\n{method}", ">error to\nnearest", f">error\n{method}", ">worth\nfrom"]
    table = plain_table("sites" if by_kind else "site", *heads, *([">moved"] if wide else []))
    for row in rows[:MOST_KINDS]:
        moved = [share_in_words(row.moved)] if wide else []
        table.add_row(shown(row.name), *map(figure, (*row.gains, *row.errors)), share_in_words(row.worth_from), *moved)
    console.print(table)
    if len(rows) > MOST_KINDS:
        console.print(f"[dim]and {len(rows) - MOST_KINDS} more[/dim]")
    dtypes = " or ".join(dict.fromkeys(row.dtype for row in rows))
    worst = "; of a row the least gain, the largest error" if by_kind else ""
    console.print(
        "[dim]gain, error: the share of a delta that an input which the adapter reacts to sees in "
        f"{escape(dtypes)}, 1 is all, and how far off that is{worst}; {WORTH_FROM}[/dim]"
    )
