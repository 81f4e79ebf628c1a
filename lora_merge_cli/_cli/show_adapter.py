"""An adapter that lies beside its base, for people."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.console import Console
from rich.table import Table

from lora_merge_cli._cli.console import plain_table, print_lines, shown
from lora_merge_cli._cli.kind_tables import MOST_SOURCES, print_adapter_heading, with_rest
from lora_merge_cli.inspection import AdapterRecord
from lora_merge_cli.records import AdapterRow, Scale
from lora_merge_cli.reports.kinds import MOST_KINDS, kinds, source_pattern, spread
from lora_merge_cli.reports.words import byte_size, counted, quantity


def print_adapter_alone(console: Console, adapter: AdapterRecord) -> None:
    """What an adapter says of itself, below the lines that say what and where it is."""
    _print_base(console, adapter)
    _print_targets(console, adapter)


def print_adapter(console: Console, adapter: AdapterRecord, number: int | None, told: Collection[str]) -> None:
    """An adapter beside the checkpoint that it is merged into.

    Args:
        console: Where to.
        adapter: The adapter.
        number: Which of several it is, from 1.
        told: Notes that are printed elsewhere.
    """
    console.print()
    print_adapter_heading(console, number, adapter.path, adapter.weight)
    console.print(
        f"{shown(adapter.method)} ({adapter.format}, {adapter.dialect}), {quantity(adapter.parameters)} parameters in "
        f"{counted(adapter.leaves, 'key')}, {byte_size(adapter.nbytes)}"
    )
    if adapter.matched is not None:
        style = "green" if adapter.matched == adapter.leaves else "bold red"
        console.print(f"[{style}]{adapter.matched} of {counted(adapter.leaves, 'key')} matched[/{style}]")
    _print_base(console, adapter)
    _print_targets(console, adapter)
    print_lines(console, "note", [note for note in adapter.notes if note not in told], "dim")


def _print_base(console: Console, adapter: AdapterRecord) -> None:
    said = "names no base" if adapter.base is None else f"made for {shown(adapter.base)}"
    console.print(said, overflow="fold")


def _print_targets(console: Console, adapter: AdapterRecord) -> None:
    if adapter.rows:
        console.print()
        console.print(_targets(adapter))
        sources = list(dict.fromkeys(source_pattern(row.scale.source) for row in adapter.rows))
        for source in sources[:MOST_SOURCES]:
            console.print(f"[dim]scale: {shown(source)}[/dim]")
        if len(sources) > MOST_SOURCES:
            console.print(f"[dim]and {len(sources) - MOST_SOURCES} more, all of them with --json[/dim]")
    print_lines(console, "rides along", adapter.riding, "bold")


def _targets(adapter: AdapterRecord) -> Table:
    table = plain_table("targets", ">layers", ">rank", ">scale", ">out x in")
    rows = kinds(adapter.rows, lambda row: row.module, _likeness, lambda row: row.shape)
    for kind in rows[:MOST_KINDS]:
        shape = " x ".join(str(extent or "-") for extent in kind.members[0].shape)
        ranks = spread(row.rank for row in kind.members)
        table.add_row(shown(kind.counted), kind.layers, ranks, _scale([row.scale for row in kind.members]), shape)
    return with_rest(table, rows)


def _likeness(row: AdapterRow) -> tuple[object, ...]:
    return row.rank, row.scale.value, source_pattern(row.scale.source), row.shape


def _scale(scales: Sequence[Scale]) -> str:
    known = [scale.value for scale in scales if scale.value is not None]
    if len(known) < len(scales):
        return "unknown"
    return spread(known, "*" if any(scale.assumed for scale in scales) else "")
