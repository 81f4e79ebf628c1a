"""What the judge makes of an entry of several fine-tunes, and all that float32 may rightly make of it. NumPy, float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from lora_merge_cli.draws import keep_run
from lora_merge_cli.records import Array
from lora_merge_cli.verification.doubts import Doubts

_TINY = 2.0**-126
_DRAWN = 2**20
_CHOICES = 12
"""How many shares of one entry may be open: the outcomes are twice two to the power of that."""

_At: TypeAlias = slice | Array

Values: TypeAlias = Mapping[int, Array]
"""By the number of the tensor, 0 the base's: one axis of float64 each."""


@dataclass(frozen=True)
class Kept:
    """Where the largest sizes of a difference end."""

    low: float
    """Whatever is smaller, its own error added, is dropped."""
    high: float
    """Whatever is larger, its own error taken away, is kept. `low` where the sizes are exact."""
    last: int | None
    """Of exact sizes, the place of the last one of size `low` that is kept; None if all are."""


@dataclass(frozen=True)
class Lottery:
    """Which entries are kept by lot; see `draws`."""

    seed: int
    """What it draws from."""
    name: str
    """What it is called."""
    density: float
    """The chance of an entry."""


@dataclass(frozen=True)
class Share:
    """``weight * (plus - minus)``, or a part of it."""

    weight: float
    """Its factor."""
    plus: int
    """A tensor."""
    minus: int
    """The tensor that it is seen from."""
    number: int
    """Which fine-tune's share it is, from 0."""
    kept: Kept | Lottery | None = None
    """Which entries count; all if None."""


@dataclass(frozen=True)
class Making:
    """``scale * start + sum of the shares``, or, with an election, of those that have the sign of their sum."""

    start: int
    """A tensor."""
    shares: tuple[Share, ...] = ()
    """What is added."""
    scale: float = 1.0
    """What `start` is multiplied by."""
    election: Literal["mean", "sum"] | None = None
    """``mean``: what has the sign is divided by the sum of its weights, 0 counting as 1."""

    @property
    def is_plain(self) -> bool:
        """Whether it is `start` as it is."""
        return not self.shares and self.scale == 1

    @property
    def tensors(self) -> tuple[int, ...]:
        """All that it is made of."""
        return tuple(sorted({self.start, *(n for share in self.shares for n in (share.plus, share.minus))}))


def is_exact(share: Share, errors: Values) -> bool:
    """Whether a share is of stored values alone."""
    return share.plus not in errors and share.minus not in errors


def difference_of(share: Share, values: Values, errors: Values, *, wide: bool) -> Array:
    """``plus - minus``, float64; of stored values what float32 makes of it, which is what the methods are defined on."""
    plus, minus = values[share.plus], values[share.minus]
    if wide or not is_exact(share, errors):
        return np.asarray(plus - minus)
    with np.errstate(over="ignore"):
        return np.asarray((plus.astype(np.float32) - minus.astype(np.float32)).astype(np.float64))


def size_of(share: Share, values: Values, errors: Values, *, wide: bool) -> Array:
    """The size of `difference_of`, and of stored values in float32 again: sizes are compared so."""
    size = np.abs(difference_of(share, values, errors, wide=wide))
    return size.astype(np.float32).astype(np.float64) if is_exact(share, errors) else size


def doubt_of(share: Share, values: Values, errors: Values) -> Array:
    """How far a computed ``plus - minus`` may be off in float32: the errors of both, and two roundings."""
    nothing = np.zeros(())
    found = errors.get(share.plus, nothing) + errors.get(share.minus, nothing)
    return np.asarray(found + 2.0**-23 * (np.abs(values[share.plus] - values[share.minus]) + found))


def made(making: Making, values: Values, errors: Values, places: Array, *, wide: bool = False) -> tuple[Array, Doubts]:
    """A run of entries of the joint leaf.

    With ``p_i = w_i d_i`` the n shares and A the start times its scale, float32 rounds each w, d and p, the sum n - 1 times, its
    sum with A once, and what the scale rounds: at most ``u ((n + 3) sum |p_i| + |A|)``, and ``2 u |A|`` more for a scale that
    is not 1, with u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, section 2.2), and ``|w_i|`` times what d_i
    itself is off.
    A mean of TIES has its divisor's n + 2 roundings as well.

    Args:
        making: What to make.
        values: Of all its tensors.
        errors: How far those that are computed may be off.
        places: Where in the leaf each entry lies.
        wide: Whether a merge computes in float64: u is 2^-53.

    Returns:
        The values, float64, and their doubts. An entry that nothing changes is exact.
    """
    entries = _Entries(making, values, errors, places, wide=wide)
    return entries.summed() if making.election is None else entries.elected()


class _Entries:
    """One run."""

    def __init__(self, making: Making, values: Values, errors: Values, places: Array, *, wide: bool) -> None:
        self._making, self._size = making, places.size
        self._unit = 2.0**-53 if wide else 2.0**-24
        start = values[making.start]
        self._anchor = making.scale * start
        self._anchor_error = abs(making.scale) * errors.get(making.start, np.zeros(places.size))
        if making.scale != 1:
            self._anchor_error = self._anchor_error + 2 * self._unit * np.abs(self._anchor) + _TINY
        count = len(making.shares)
        self._weights = np.array([share.weight for share in making.shares])
        self._parts, self._errors = (np.zeros((count, places.size)) for _ in range(2))
        self._kept = np.ones((count, places.size), bool)
        self._open = np.zeros((count, places.size), bool)
        self._signless = np.zeros((count, places.size), bool)
        for row, share in enumerate(making.shares):
            difference = difference_of(share, values, errors, wide=wide)
            self._parts[row] = share.weight * difference
            if not is_exact(share, errors):
                doubt = doubt_of(share, values, errors)
                self._errors[row] = abs(share.weight) * doubt
                self._signless[row] = np.abs(difference) <= doubt
            if isinstance(share.kept, Lottery):
                self._kept[row] = _drawn(share.kept, places)
            elif isinstance(share.kept, Kept):
                size = size_of(share, values, errors, wide=wide)
                if is_exact(share, errors):
                    self._kept[row] = size >= share.kept.low
                    if share.kept.last is not None:
                        self._kept[row] &= (size > share.kept.low) | (places <= share.kept.last)
                else:
                    self._kept[row] = size >= (share.kept.low + share.kept.high) / 2
                    doubt = doubt_of(share, values, errors)
                    self._open[row] = (size - doubt <= share.kept.high) & (size + doubt >= share.kept.low)

    def summed(self) -> tuple[Array, Doubts]:
        """Without an election."""
        change, size, error = self._totals(slice(None), self._kept)
        return self._with_anchor(slice(None), change, size, error)

    def elected(self) -> tuple[Array, Doubts]:
        """With one: the likeliest outcome, and all others that errors allow."""
        whole = slice(None)
        total, _, _ = self._totals(whole, self._kept)
        values, doubts = self._outcome(whole, self._kept, total >= 0)
        return values, self._alternatives(doubts)

    def _alternatives(self, doubts: Doubts) -> Doubts:
        can_be_plus, can_be_minus = self._signs(slice(None), self._kept)
        # Of a share whose own sign is open, whether it counts among those with the elected sign is.
        choices = self._open | (self._signless & self._kept)
        unsure = np.flatnonzero(choices.any(axis=0) | (can_be_plus & can_be_minus))
        if not unsure.size:
            return doubts
        found: list[tuple[Array, Array, Array]] = []
        patterns, which = np.unique(choices[:, unsure], axis=1, return_inverse=True)
        for number, pattern in enumerate(patterns.T):
            at = unsure[which.reshape(-1) == number]
            rows = np.flatnonzero(pattern)[:_CHOICES]
            for taken in itertools.product((True, False), repeat=len(rows)):
                kept = self._kept[:, at].copy()
                kept[rows] = np.array(taken)[:, None]
                for allowed, sign in zip(self._signs(at, kept), (True, False), strict=True):
                    values, other = self._outcome(at, kept, np.full(at.size, sign))
                    found.append((at[allowed], values[allowed], other.error[allowed]))
        places, values, errors = (np.concatenate(each) for each in zip(*found, strict=True))
        order = np.argsort(places, kind="stable")
        return Doubts(doubts.error, places[order], values[order], errors[order])

    def _signs(self, at: _At, kept: Array) -> tuple[Array, Array]:
        """Whether plus, and whether minus, may be elected.

        The sign of a sum of two products without roundings is exact, and 0 counts as plus; each rounding may turn it where the sum
        is as small as the rounding is.
        """
        total, _, _ = self._totals(at, kept)
        parts = np.where(kept, self._parts[:, at], 0.0)
        exact = all(weight == 0 or math.frexp(abs(weight))[0] == 0.5 for weight in self._weights)
        roundings = (0 if exact else 2) + np.maximum(np.count_nonzero(parts, axis=0) - 2, 0)
        leeway = np.where(kept, self._errors[:, at], 0.0).sum(axis=0) + roundings * self._unit * np.abs(parts).sum(
            axis=0
        )
        return total >= -leeway, (total <= leeway) & ((leeway > 0) | (total < 0))

    def _outcome(self, at: _At, kept: Array, plus: Array) -> tuple[Array, Doubts]:
        """What some entries are if these shares are kept and this sign is elected."""
        parts = self._parts[:, at]
        agrees = kept & (np.where(plus, parts > 0, parts < 0) | self._signless[:, at])
        change, size, error = self._totals(at, agrees)
        if self._making.election == "mean":
            weights = np.where(agrees, self._weights[:, None], 0.0)
            divisor = weights.sum(axis=0)
            divisor[divisor == 0] = 1
            rounded = (len(weights) + 2) * self._unit * np.abs(weights).sum(axis=0) / np.abs(divisor)
            change, size, error = change / divisor, size / np.abs(divisor), error / np.abs(divisor)
            error = error + rounded * (np.abs(change) + error)
        return self._with_anchor(at, change, size, error)

    def _totals(self, at: _At, taken: Array) -> tuple[Array, Array, Array]:
        """The sum of some shares, the size of what it sums, and its error."""
        parts = np.where(taken, self._parts[:, at], 0.0)
        errors = np.where(taken, self._errors[:, at], 0.0).sum(axis=0)
        size = np.abs(parts).sum(axis=0)
        error = (len(parts) + 2) * self._unit * size + errors
        return parts.sum(axis=0), size, np.where(error > 0, error + len(parts) * _TINY, 0.0)

    def _with_anchor(self, at: _At, change: Array, size: Array, error: Array) -> tuple[Array, Doubts]:
        anchor = self._anchor[at]
        sum_error = np.where(error > 0, error + self._unit * (np.abs(anchor) + size), 0.0)
        return anchor + change, Doubts.of(sum_error + self._anchor_error[at])


def _drawn(lottery: Lottery, places: Array) -> Array:
    """Which of the entries at some ascending places are kept."""
    found = []
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    for run in np.split(places, breaks):
        for start in range(0, run.size, _DRAWN):
            first, last = int(run[start]), int(run[min(start + _DRAWN, run.size) - 1])
            found.append(keep_run(lottery.seed, lottery.name, first, last + 1, lottery.density))
    return np.concatenate(found)
