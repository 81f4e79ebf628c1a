"""What people see: tables for stdout, a progress bar for stderr. Everything fits 80 columns."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_merge_cli.reports.words import byte_size, figure, quantity, survival_for

if TYPE_CHECKING:
    from lora_merge_cli.inspection import BaseRow, Inspection, SiteRow
    from lora_merge_cli.listening import Listener
    from lora_merge_cli.report import MergeReport, SiteRecord

_OFF_TERMINAL_WIDTH = 100
_MANY = 12
_NAME_WIDTH = 28


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _OFF_TERMINAL_WIDTH
    return console


@contextlib.contextmanager
def progress(*, visible: bool) -> Iterator[Listener | None]:
    """A bar on stderr while the block runs; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    if not (visible and console.is_terminal):
        yield None
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(binary_units=True),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console, transient=True) as bar:
        yield _Bar(bar)


class _Bar:
    """The listener that moves the bar."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._task: Any = None

    def start(self, total_bytes: int) -> None:
        self._task = self._bar.add_task("merging", total=total_bytes)

    def advance(self, name: str, done_bytes: int) -> None:
        self._bar.update(self._task, advance=done_bytes, description=name[-_NAME_WIDTH:])


def print_inspection(found: Inspection) -> None:
    """An `Inspection` for people."""
    console = _console()
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
    _print_lines(console, "note", found.notes, "dim")
    _print_lines(console, "would be refused", found.problems, "bold red")
    console.print("\n[bold]Next[/bold]")
    for line in found.advice:
        console.print(f"  {escape(line)}", soft_wrap=line.startswith("lora-merge"))


def print_plan(report: MergeReport) -> None:
    """A dry run for people."""
    console = _console()
    console.print(f"[bold]{report.model}: {len(report.sites)} adapters to merge[/bold] (dry run, nothing written)")
    _print_report_sites(console, report.sites)
    _print_changes(console, report)
    console.print(
        f"to write: up to {byte_size(report.output_bytes)}; peak memory: about {byte_size(report.peak_bytes_planned)}"
    )
    _print_lines(console, "warning", report.warnings, "bold yellow")
    _print_lines(console, "note", report.notes, "dim")


def print_report(report: MergeReport) -> None:
    """A finished merge for people."""
    console = _console()
    console.print(f"[bold green]merged[/bold green] {len(report.sites)} adapters of {report.model}")
    table = _table("site", ">rank", ">scale", ">|d|/|w|", ">max|d|", ">stored", ">served")
    for site in report.sites:
        stored, served = (survival_for(site, d) for d in (site.dtype, report.serving_dtype))
        table.add_row(
            escape(site.label),
            str(site.rank),
            _starred(site),
            figure(site.relative_norm),
            figure(site.max_abs),
            *(figure(s.gain_along_inputs if s else None) for s in (stored, served)),
        )
    console.print(table)
    stored_as = ", ".join(sorted({site.dtype for site in report.sites}))
    console.print(
        f"[dim]stored, served: the share of each delta that an input which the adapter reacts to sees in "
        f"{stored_as} and in {report.serving_dtype}; 1 is all[/dim]"
    )
    _print_changes(console, report)
    _print_lines(console, "warning", report.warnings, "bold yellow")
    _print_lines(console, "note", report.notes, "dim")
    if report.output and report.bytes_on_disk is not None and report.seconds is not None:
        console.print(
            f"[bold]{escape(report.output)}[/bold]  {byte_size(report.bytes_on_disk)} in {report.seconds:.1f} s, "
            f"peak {byte_size(report.peak_rss_bytes or 0)}",
            overflow="fold",
        )


def _table(*columns: str) -> Table:
    """A plain table; a column named with ``>`` is right-aligned."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        number = name.startswith(">")
        table.add_column(
            name.removeprefix(">"),
            justify="right" if number else "left",
            no_wrap=number,
            overflow="fold",
        )
    return table


def _starred(site: SiteRow | SiteRecord) -> str:
    """A site's scale; starred where nobody stated it."""
    if site.scale is None:
        return "unknown"
    return f"{site.scale:.4g}{'*' if site.scale_assumed else ''}"


def _print_sites(console: Console, sites: Sequence[SiteRow]) -> None:
    measured = any(site.stats for site in sites)
    # Either fits 80 columns; both together do not.
    more = [">|d|/|w|", ">worst", ">eff.rank", ">NaN"] if measured else ["equation"]
    table = _table("site", ">rank", ">layers", ">scale", *more)
    for site in sites:
        row = [escape(site.label), str(site.rank), str(site.layers or "-"), _starred(site)]
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
    table = _table("part", "status", ">leaves", ">parameters", ">bytes")
    for row in found.groups:
        status = {"lora": "frozen + LoRA", "adapter": "LoRA factors", "trained": "fully trained"}
        table.add_row(
            row.part,
            status.get(row.status, row.status),
            str(row.leaves),
            quantity(row.parameters),
            byte_size(row.nbytes),
        )
    return table


def _print_base(console: Console, rows: Sequence[BaseRow]) -> None:
    counts = Counter(row.status for row in rows)
    summary = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    console.print(f"\n[bold]against the base[/bold]: {summary}")
    table = _table("leaf that is not the base's", "status", ">|change|/|base|")
    for row in rows:
        if row.status not in ("frozen", "adapter"):
            table.add_row(escape(row.path), row.status, figure(row.relative_change))
    console.print(table)


def _print_assets(console: Console, found: Inspection) -> None:
    assets = found.assets
    if not assets.problems:
        console.print(f"\nassets: norm stats of {', '.join(assets.asset_ids)}, sane")
    elif found.model != "unknown" or assets.files:
        _print_lines(console, "assets", assets.problems, "bold yellow")


def _print_report_sites(console: Console, sites: Sequence[SiteRecord]) -> None:
    table = _table("site", ">rank", "equation", ">scale", "stored as")
    for site in sites:
        stored = site.dtype if site.dtype == site.source_dtype else f"{site.source_dtype} > {site.dtype}"
        table.add_row(escape(site.label), str(site.rank), site.equation, _starred(site), stored)
    console.print(table)
    for group, source in dict.fromkeys((site.group, site.scale_source) for site in sites):
        console.print(f"[dim]{group}: {escape(source)}[/dim]")


def _print_changes(console: Console, report: MergeReport) -> None:
    origins = Counter(leaf.origin for leaf in report.copied)
    for origin, count in sorted(origins.items()):
        console.print(f"{count} leaves {origin}")
    for reason, count in Counter(leaf.reason for leaf in report.dropped).items():
        console.print(f"{count} dropped: {escape(reason)}")


def _print_lines(console: Console, word: str, lines: Sequence[str], style: str) -> None:
    for line in lines[:_MANY]:
        console.print(f"[{style}]{word}:[/{style}] {escape(line)}", overflow="fold")
    if len(lines) > _MANY:
        console.print(f"[{style}]{word}:[/{style}] and {len(lines) - _MANY} more")
