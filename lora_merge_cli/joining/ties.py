"""TIES: trim what each fine-tune changes, elect a sign per entry, and average those that agree.

Yadav et al., arXiv:2306.01708, section 4, as mergekit 0.1.5 does it by default (``generalized_task_arithmetic.py`` and
``sparsify.py``):

1. of each ``d_i = T_i - B`` keep the ``max(1, int(density * size))`` largest entries of the whole leaf, by size in float32; of
   entries of one size the earlier ones;
2. the sign of ``sum of w_i d_i`` is elected, 0 counting as plus;
3. ``W = B + sum of w_i d_i / sum of w_i`` over those i whose ``w_i d_i`` has that sign; a divisor of 0 counts as 1.

The divisor cancels a lone weight: one fine-tune alone moves by all of ``d_1`` whatever ``w_1`` but 0. At weight 1 and density 1
that is task arithmetic.

The smallest size that is kept follows exactly from counts: sizes in float32 are ordered as their bits are, so one reading counts
the upper 16 bits, and another one the lower 16 bits of the sizes that share the upper ones of the smallest kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterable
from typing import TypeAlias

import numpy as np

from lora_merge_cli.joining.recipe import Recipe, Term, Trim
from lora_merge_cli.records import Array

Sizes: TypeAlias = Callable[[], Iterable[tuple[Array, ...]]]
"""Reads the leaf once more: the bits of the sizes of all differences, run after run, one axis each; see `size_bits`."""

_HALF = 16
_UPPER = 2**15
_LOWER = 2**16


def ties(terms: tuple[Term, ...], size: int, density: float, sizes: Sizes) -> Recipe:
    """The recipe of a leaf.

    Args:
        terms: All differences with their weights.
        size: The leaf's entries.
        density: The share to keep.
        sizes: Reads the bits of the differences' sizes, in the order of `terms`. Asked up to three times, at density 1 never.
    """
    if density == 1 and len(terms) == 1 and terms[0].weight:
        # Its weight cancels, and so does the base.
        return Recipe(0, (dataclasses.replace(terms[0], weight=1.0),)).simplest
    if density < 1 and terms:
        trims = find_trims(len(terms), max(1, int(density * size)), size, sizes)
        terms = tuple(dataclasses.replace(term, kept=trim) for term, trim in zip(terms, trims, strict=True))
    return Recipe(0, terms, election="mean")


def size_bits(difference: Array) -> Array:
    """The bits of each entry's size in float32, uint32."""
    return np.abs(difference.astype(np.float32, copy=False)).view(np.uint32)


def find_trims(count: int, keep: int, size: int, sizes: Sizes) -> list[Trim]:
    """What keeps the `keep` largest entries of each of `count` differences."""
    upper = np.zeros((count, _UPPER), np.int64)
    for run in sizes():
        for number, bits in enumerate(run):
            upper[number] += np.bincount(bits >> _HALF, minlength=_UPPER)
    heads = [_reach(counts, keep) for counts in upper]
    lower = np.zeros((count, _LOWER), np.int64)
    for run in sizes():
        for number, ((head, _), bits) in enumerate(zip(heads, run, strict=True)):
            lower[number] += np.bincount(bits[bits >> _HALF == head] & (_LOWER - 1), minlength=_LOWER)
    tails = [_reach(counts, rest) for (_, rest), counts in zip(heads, lower, strict=True)]
    smallest = [head << _HALF | tail for (head, _), (tail, _) in zip(heads, tails, strict=True)]
    # Of zeros it makes no difference how many are kept.
    wanted = {
        number: rest
        for number, (tail, rest) in enumerate(tails)
        if smallest[number] and rest < int(lower[number, tail])
    }
    last = {}
    if wanted:
        with contextlib.ExitStack() as held:
            again = iter(sizes())
            if isinstance(again, Generator):
                held.callback(again.close)
            last = _places(wanted, smallest, again)
    return [Trim(bits, last.get(number), keep / size) for number, bits in enumerate(smallest)]


def _reach(counts: Array, keep: int) -> tuple[int, int]:
    """From the largest value down, the one at which `keep` are reached, and how many of them have that very value."""
    reached = np.cumsum(counts[::-1])
    steps = int(np.searchsorted(reached, keep))
    return len(counts) - 1 - steps, keep - (int(reached[steps - 1]) if steps else 0)


def _places(wanted: dict[int, int], smallest: list[int], runs: Iterable[tuple[Array, ...]]) -> dict[int, int]:
    """Per difference, the place of the entry of its smallest kept size that is the last one to keep."""
    found: dict[int, int] = {}
    start = 0
    for run in runs:
        for number in wanted.keys() - found.keys():
            places = np.flatnonzero(run[number] == smallest[number])
            if len(places) >= wanted[number]:
                found[number] = start + int(places[wanted[number] - 1])
            else:
                wanted[number] -= len(places)
        start += run[0].size
        if len(found) == len(wanted):
            break
    return found
