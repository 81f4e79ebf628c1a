"""A resizing for people."""

from __future__ import annotations

from lora_merge_cli._cli.console import plain_table, print_lines, shown, stdout_console
from lora_merge_cli.reports.markdown_resize import most_lost_first, ranks, share, sizes
from lora_merge_cli.reports.words import counted, figure
from lora_merge_cli.resize_report import ResizeReport

_MANY = 20


def print_resize(report: ResizeReport) -> None:
    """The modules that lose most, the totals, the verdict."""
    console = stdout_console()
    table = plain_table("module", ">rank", ">energy kept", ">error", ">norm")
    modules = most_lost_first(report)
    for module in modules[:_MANY]:
        same = module.rank_before == module.rank_after
        table.add_row(
            shown(module.module),
            str(module.rank_before) if same else f"{module.rank_before} > {module.rank_after}",
            share(module.energy_kept),
            figure(module.relative_error),
            figure(module.norm),
        )
    console.print(table)
    if len(modules) > _MANY:
        console.print(f"[dim]and {len(modules) - _MANY} more that lose less: --report[/dim]")
    console.print()
    print_lines(console, "warning", report.warnings, "yellow")
    print_lines(console, "note", report.notes, "dim")
    console.print(f"factors {sizes(report)}", overflow="fold")
    place = "" if report.output is None else f"  {shown(report.output)}"
    console.print(
        f"[bold green]{report.status}[/bold green]{place}  {ranks(report)} in {counted(len(modules), 'module')}, "
        f"{share(report.energy_kept)} of the energy kept, in {report.seconds or 0:.1f} s",
        overflow="fold",
    )
