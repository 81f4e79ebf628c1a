"""A comparison of two checkpoints for people."""

from __future__ import annotations

from rich.markup import escape

from lora_merge_cli._cli.console import plain_table, print_lines, stdout_console
from lora_merge_cli.records import first_names
from lora_merge_cli.report import DiffReport
from lora_merge_cli.reports.escaping import visible
from lora_merge_cli.reports.words import byte_size, figure

_ONE_SIDED = {"only-a": "only in A", "only-b": "only in B", "reshaped": "of another shape"}


def print_diff(report: DiffReport) -> None:
    """Prefixes, the leaves that differ most, the verdict."""
    console = stdout_console()
    prefixes = plain_table("prefix", ">leaves", ">changed", ">differ", ">|b-a|/|a|", ">max|b-a|")
    for row in report.prefixes:
        prefixes.add_row(
            escape(visible(row.prefix)),
            str(row.leaves),
            str(row.changed),
            str(row.differing),
            figure(row.relative_l2),
            figure(row.max_abs),
        )
    console.print(prefixes)
    differing = [leaf for leaf in report.leaves if leaf.status in ("changed", "rounded", "within")]
    if differing:
        leaves = plain_table("leaf", "status", ">|b-a|/|a|", ">cosine", ">ulp", ">changed")
        for leaf in differing[: report.top]:
            changed = "-" if leaf.changed is None else f"{leaf.changed:.1%}"
            ulp = "-" if leaf.max_ulp is None else f"{leaf.max_ulp:.3g}"
            leaves.add_row(
                escape(visible(leaf.path)), leaf.status, figure(leaf.relative_l2), figure(leaf.cosine), ulp, changed
            )
        console.print()
        console.print(leaves)
        if len(differing) > report.top:
            console.print(f"[dim]and {len(differing) - report.top} more: --top, or --report[/dim]")
    console.print()
    for status, words in _ONE_SIDED.items():
        names = [leaf.path for leaf in report.leaves if leaf.status == status]
        if names:
            console.print(f"{len(names)} {words}: {escape(visible(first_names(names, 3)))}", overflow="fold")
    print_lines(console, "note", report.notes, "dim")
    style = "green" if report.status == "equal" else "red"
    counts = ", ".join(f"{count} {status}" for status, count in report.counts.items())
    console.print(
        f"[bold {style}]{report.status}[/bold {style}]  {counts}  in {report.seconds or 0:.1f} s, "
        f"peak {byte_size(report.peak_rss_bytes or 0)}"
    )
