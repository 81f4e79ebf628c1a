"""What is measured, beside what, and what is aimed at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Quantity = Literal["wall", "peak"]


@dataclass(frozen=True)
class Input:
    """A checkpoint that a case reads."""

    path: Path
    script: str
    """What makes it, in a process of its own."""
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One command of a case."""

    name: str
    command: tuple[str, ...]
    reads: tuple[Path, ...] = ()
    """What it reads: brought to the same state of the page cache before every run."""
    writes: Path | None = None
    """What it creates: removed before every round."""


@dataclass(frozen=True)
class Target:
    """An aim: ``quantity(row) <= times * quantity(beside) + plus``."""

    row: str
    quantity: Quantity
    """``wall``: seconds; ``peak``: resident GiB."""
    plus: float = 0.0
    """In the quantity's unit."""
    times: float = 0.0
    beside: str | None = None
    stretch: bool = False
    """Wished for, not asked for."""


@dataclass(frozen=True)
class Case:
    """Commands that are measured in turns, round by round, and what they are compared with."""

    name: str
    size: Literal["small", "full"]
    title: str
    runs: int
    rows: Callable[[], tuple[Row, ...]]
    """The commands, in the order in which they run. Asked for once the inputs are there."""
    inputs: tuple[Input, ...] = ()
    yardstick: str | None = None
    """The row that the others' times are divided by."""
    targets: tuple[Target, ...] = ()
