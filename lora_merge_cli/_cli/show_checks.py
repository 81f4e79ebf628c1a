"""A verification for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from lora_merge_cli._cli.console import plain_table, print_lines, stdout_console
from lora_merge_cli._cli.heatmap import print_heatmaps
from lora_merge_cli._cli.show_rounding import print_rounding
from lora_merge_cli.report import CheckRecord, CheckStatus, VerifyReport
from lora_merge_cli.reports.escaping import visible
from lora_merge_cli.reports.words import adapters_in_words, byte_size, model_name

_STYLES = {"pass": "green", "warn": "bold yellow", "fail": "bold red", "skip": "dim"}
_KEYS = 3


def print_verification(report: VerifyReport) -> None:
    """Heatmaps, checks, verdict."""
    console = stdout_console()
    print_heatmaps(console, report)
    print_rounding(console, report)
    console.print()
    print_checks(console, report.checks)
    print_lines(console, "warning", report.warnings, "bold yellow")
    print_lines(console, "note", report.notes, "dim")
    merged = next((source.path for source in report.sources if source.role == "merged"), "the result")
    name = model_name(report)
    verdict = "[bold red]NOT verified[/bold red]" if report.failed else "[bold green]verified[/bold green]"
    console.print(
        f"{verdict}  {f'{escape(name)}, ' if name else ''}{adapters_in_words(report)}: {tally(report.checks)}"
    )
    console.print(
        f"[bold]{escape(merged)}[/bold]  in {report.seconds or 0:.1f} s, peak {byte_size(report.peak_rss_bytes or 0)}",
        overflow="fold",
    )


def print_checks(console: Console, checks: Sequence[CheckRecord]) -> None:
    """One line for each check, and the first keys of those that fail."""
    rows = plain_table("check", "", "")
    for check in checks:
        message = Text(visible(check.message))
        if check.status == "fail" and check.where:
            shown = check.where[:_KEYS]
            more = len(check.where) - len(shown)
            message.append("".join(f"\n  {visible(key)}" for key in shown) + (f"\n  and {more} more" if more else ""))
        style = "dim" if check.status == "skip" else ""
        rows.add_row(
            Text(check.id, style), Text(check.status, _STYLES[check.status]), Text.assemble((message.plain, style))
        )
    console.print(rows)


def tally(checks: Sequence[CheckRecord]) -> str:
    """For example ``9 passed, 1 warning, 1 skipped``."""
    counts = Counter(check.status for check in checks)
    words: dict[CheckStatus, str] = {"fail": "failed", "warn": "with warnings", "pass": "passed", "skip": "skipped"}
    return ", ".join(f"{counts[status]} {word}" for status, word in words.items() if counts[status])
