"""The k-th largest of many values that are read as often as need be and never held: by samples and brackets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from lora_merge_cli.records import Array

Runs: TypeAlias = Callable[[], Iterable[Sequence[Array]]]
"""Reads some sequences once more: run after run, one array of float64 values per sequence, without NaN."""

_HELD = 2**19
"""How many values of a sequence are held at most, about."""


@dataclass(frozen=True)
class Largest:
    """Where the k largest values of a sequence end."""

    value: float
    """The smallest of them."""
    rest: int
    """How many of the k have that very value."""
    equal: int
    """How many values of the sequence are that very value."""


def k_largest(k: int, count: int, runs: Runs) -> list[Largest]:
    """Where the k largest of each of `count` sequences end.

    Every reading counts what lies above a bracket and holds what lies in it, or a part in even steps where that is too much; the
    part says where to put the next bracket.

    Args:
        k: From 1 to the length of the sequences.
        count: How many sequences there are.
        runs: Reads them.
    """
    searches = [_Search(k) for _ in range(count)]
    while any(search.found is None for search in searches):
        for run in runs():
            for search, values in zip(searches, run, strict=True):
                if search.found is None:
                    search.take(values)
        for search in searches:
            if search.found is None:
                search.conclude()
    return [search.found for search in searches if search.found is not None]


def place_of(number: int, value: float, runs: Iterable[Array]) -> int:
    """The place of the `number`-th entry, from 1, that has a value; from 0, in the order of the runs."""
    start = 0
    for values in runs:
        at = np.flatnonzero(values == value)
        if len(at) >= number:
            return start + int(at[number - 1])
        number -= len(at)
        start += values.size
    raise RuntimeError("another reading has other values")


@dataclass
class _Search:
    """The search in one sequence: its k-th largest value lies from `low` to `high`, and is looked for from `first` to `last`."""

    k: int
    low: float = -math.inf
    high: float = math.inf
    first: float = -math.inf
    last: float = math.inf
    above: int = 0
    inside: int = 0
    step: int = 1
    held: list[Array] = field(default_factory=list)
    found: Largest | None = None

    def take(self, values: Array) -> None:
        self.above += int(np.count_nonzero(values > self.last))
        within = values[(values >= self.first) & (values <= self.last)]
        self.held.append(within[-self.inside % self.step :: self.step].copy())
        self.inside += within.size
        if sum(part.size for part in self.held) > 2 * _HELD:
            thinned: Array = np.concatenate(self.held)[::2]
            self.held, self.step = [thinned], 2 * self.step

    def conclude(self) -> None:
        held = np.sort(np.concatenate(self.held))[::-1]
        rank = self.k - self.above
        if rank < 1:
            self.low = self.first = math.nextafter(self.last, math.inf)
            self.last = self.high
        elif rank > self.inside:
            self.high = self.last = math.nextafter(self.first, -math.inf)
            self.first = self.low
        elif self.first == self.last:
            self.found = Largest(self.first, rank, self.inside)
        elif self.step == 1:
            value = float(held[rank - 1])
            larger = int(np.count_nonzero(held > value))
            self.found = Largest(value, rank - larger, int(np.count_nonzero(held == value)))
        else:
            self._narrow(held, (rank - 1) // self.step)
        self.above = self.inside = 0
        self.step, self.held = 1, []

    def _narrow(self, sample: Array, at: int) -> None:
        """Look around the place in a sample, from its largest value, where the k-th one should be."""
        self.low, self.high = self.first, self.last
        margin = 8 + 4 * math.isqrt(sample.size)
        if at + margin < sample.size:
            self.first = float(sample[at + margin])
        if at >= margin:
            self.last = float(sample[at - margin])
        if (self.first, self.last) == (self.low, self.high):
            self.first = self.last = float(sample[min(at, sample.size - 1)])
