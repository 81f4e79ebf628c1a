"""What every printed result is made of. Everything fits 80 columns."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_merge_cli.reports.escaping import visible

if TYPE_CHECKING:
    from lora_merge_cli.inspection import SiteRow
    from lora_merge_cli.listening import Listener
    from lora_merge_cli.report import SiteRecord

_OFF_TERMINAL_WIDTH = 100
_MANY = 12
_NAME_WIDTH = 28


class _Console(Console):
    """A console that leaves it to the command what a reader means that went away."""

    def on_broken_pipe(self) -> None:
        """See `rich.console.Console.on_broken_pipe`."""
        raise BrokenPipeError


def stdout_console() -> Console:
    """The console of results."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    console = _Console(highlight=False)
    if not console.is_terminal:
        console.width = _OFF_TERMINAL_WIDTH
    return console


@contextlib.contextmanager
def progress(word: str, *, visible: bool) -> Iterator[Listener | None]:
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
        yield _Bar(bar, word)


class _Bar:
    """The listener that moves the bar."""

    def __init__(self, bar: Any, word: str) -> None:
        self._bar = bar
        self._word = word
        self._task: Any = None

    def start(self, total_bytes: int) -> None:
        if self._task is not None:
            # A second pass, over what the first one wrote.
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(self._word, total=total_bytes)

    def advance(self, name: str, done_bytes: int) -> None:
        self._bar.update(self._task, advance=done_bytes, description=name[-_NAME_WIDTH:])


def plain_table(*columns: str) -> Table:
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


def shown(text: str) -> str:
    """A checkpoint's string as it may stand in what is printed."""
    return escape(visible(text))


def starred(site: SiteRow | SiteRecord) -> str:
    """A site's scale; starred where nobody stated it."""
    if site.scale is None:
        return "unknown"
    return f"{site.scale:.4g}{'*' if site.scale_assumed else ''}"


def print_lines(console: Console, word: str, lines: Sequence[str], style: str) -> None:
    """Lines after a word in a style; not all where there are many."""
    for line in lines[:_MANY]:
        console.print(f"[{style}]{word}:[/{style}] {shown(line)}", overflow="fold")
    if len(lines) > _MANY:
        console.print(f"[{style}]{word}:[/{style}] and {len(lines) - _MANY} more")
