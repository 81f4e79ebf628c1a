"""Which neighbour of a result should have been stored where it was not rounded to nearest: NumPy and float64.

`rounding` names the methods, `draws` the random bits. A right float32 merge computes each result with an error, here its *slack*.
What is judged is never where a merge arrived, but each of its steps from where it really was: the file has all that a choice
depends on, and one wrong choice makes no others wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from lora_merge_cli.draws import rounding_bits
from lora_merge_cli.dtypes import BFLOAT16, FLOAT32, holds_all_values_of, ulp
from lora_merge_cli.records import Array, Region, region_shape
from lora_merge_cli.rounding import LeafRounding, Rounding, penalty

_EPSILON = 2.0**-24
_CHOSEN_FROM = 2.0**-118
"""Below, the step may be subnormal in float32, and then there is no choice."""
_DRAWS = 2.0**16
_GROUP = 64
"""How many inputs of a walk are judged at once."""


@dataclass(frozen=True)
class Chosen:
    """How the entries of one leaf should have been chosen."""

    preserves: bool
    """Whether by error feedback; else at random."""
    grid: np.dtype[Any]
    """The dtype between whose values is chosen."""
    mu: float
    """See `Rounding.mu`."""
    seed: int
    """See `Rounding.seed`."""
    widened: bool
    """Whether a wider file holds the chosen values themselves."""
    name: str
    """The leaf's name in the output, which random bits depend on."""
    shape: tuple[int, ...]
    """The leaf's."""

    @classmethod
    def of(cls, rounding: LeafRounding, asked: Rounding, name: str, shape: tuple[int, ...]) -> Chosen | None:
        """What is to be judged of a leaf; None if it is rounded to nearest.

        Args:
            rounding: What the leaf gets.
            asked: What the user asks for.
            name: The leaf's name in the output.
            shape: The leaf's.
        """
        if rounding.grid is None:
            return None
        widened = asked.serving_values == "widened"
        return cls(rounding.method == "preserve", rounding.grid, asked.mu, asked.seed, widened, name, shape)

    def bits(self, region: Region) -> Array:
        """The random bits of a part of the leaf, uint16, in its shape; see `draws.rounding_bits`."""
        cut = [axis for axis, part in enumerate(region) if part.stop - part.start < self.shape[axis]]
        axis = cut[-1] if cut else 0
        found = np.empty(region_shape(region), np.uint16)
        lead = found.shape[:axis]
        runs = found.reshape(math.prod(lead), -1)
        for number, index in enumerate(np.ndindex(*lead)):
            at = [part.start + i for part, i in zip(region, index, strict=False)]
            corner = [*at, *(part.start for part in region[axis:])]
            start = int(np.ravel_multi_index(corner, self.shape)) if corner else 0
            runs[number] = rounding_bits(self.seed, self.name, start, start + runs.shape[1])
        return found

    def served(self, values: Array, stored: np.dtype[Any]) -> Array:
        """float64 values of a stored dtype as the values of the grid that a server makes of them."""
        if holds_all_values_of(self.grid, stored):
            return values
        return np.asarray(values.astype(self.grid).astype(np.float64))

    def step(self, ideal: Array, slack: Array) -> Array:
        """The distance of the neighbours of a result, where a slack may put it beyond a power of two the larger one."""
        return ulp(np.abs(ideal) + slack, self.grid)

    def has_choice(self, ideal: Array) -> Array:
        """Whether both neighbours of a result may be stored: none is Inf, and the step is not subnormal in float32."""
        size = np.abs(ideal)
        found = size <= float(ml_dtypes.finfo(self.grid).max)  # type: ignore[no-untyped-call]
        if self.grid == BFLOAT16:
            found &= size >= _CHOSEN_FROM
        return np.asarray(found)

    def dither(self, ideal: Array, step: Array, bits: Array) -> Array:
        """What turns the error of an entry that was chosen at random into that of one rounded to nearest.

        With ``p = |ideal| / step`` and r the bits, ``ceil(p - r / 2^16)`` is p rounded down, or up iff ``r < 2^16 (p - floor p)``.
        So a right choice c has ``-1/2 <= |c| / step - (p - r / 2^16 + 1/2) < 1/2``.

        Args:
            ideal: The results, float64.
            step: See `step`.
            bits: 16 random bits each.

        Returns:
            What to add to ``c - ideal``, which is then at most ``step / 2``, and the slack.
        """
        found = (bits / _DRAWS - 0.5) * step
        return np.asarray(np.where(self.has_choice(ideal), np.copysign(1.0, ideal) * found, 0.0))

    def stored_shares(self, stored: Array, exact: Array, chosen: Array, slack: Array) -> tuple[Array, Array]:
        """Whether a float32 file has what it should, its server's cast of which is right.

        Args:
            stored: What it has, float64.
            exact: The exact results, float64.
            chosen: What a server makes of `stored`.
            slack: How far a float32 computation of `exact` may be off.

        Returns:
            The errors as shares of their bounds, Inf where a value must be another one exactly; and whether an entry should not be
            the exact result.
        """
        bound = slack + 2 * _EPSILON * np.abs(exact)
        if self.widened:
            return np.where(stored == chosen, 0.0, np.inf), np.abs(chosen - exact) > bound
        # The exact value, or the last float32 number before the middle of the chosen value and the next one.
        outwards = (exact > chosen) == (chosen > 0)
        inner = ulp(np.nextafter(np.abs(chosen), 0.0), self.grid)
        beside = np.where(outwards | (chosen == 0), ulp(chosen, self.grid), inner)
        middle = chosen + np.copysign(0.5 * beside, exact - chosen)
        past = np.nextafter(middle.astype(FLOAT32), chosen.astype(FLOAT32)).astype(np.float64)
        ideal = np.where(np.abs(exact - chosen) <= np.abs(past - chosen), exact, past)
        moved = np.abs(exact - ideal) > bound
        error = np.abs(stored - ideal)
        return np.where(moved, np.where(error == 0, 0.0, np.inf), error / bound), moved


@dataclass(frozen=True)
class Compared:
    """Entries beside what they should be, float64."""

    shares: Array
    """Their errors as shares of their bounds. Of ``preserve``, bounds of what is one of the two neighbours; see `Walk`."""
    error: Array
    """What a server makes of the entries, less what was aimed at."""
    step: Array
    """See `Chosen.step`."""
    limit: Array
    """How far an entry of the file may be from what was aimed at, at most."""
    moved: int
    """How many entries of a wider file should not be the exact result."""


def compare(
    chosen: Chosen, stored: np.dtype[Any], values: Array, exact: Array, ideal: Array, slack: Array, bits: Array | None
) -> Compared:
    """Judge some entries, all of one shape and float64.

    Args:
        chosen: What was asked for.
        stored: What the file stores them in.
        values: The file's.
        exact: The exact results.
        ideal: What was aimed at.
        slack: How far a float32 computation of either may be off.
        bits: 16 random bits each; None for ``preserve``.
    """
    served = chosen.served(values, stored)
    step = chosen.step(ideal, slack)
    error = served - ideal
    limit = step + slack
    if bits is None:
        shares = np.abs(error) / limit
    else:
        shares = np.abs(error + chosen.dither(ideal, step, bits)) / (0.5 * step + slack)
    if stored == chosen.grid:
        return Compared(shares, error, step, limit, 0)
    as_stored, moved = chosen.stored_shares(values, exact, served, slack)
    np.maximum(shares, as_stored, out=shares)
    return Compared(shares, error, step, limit + 0.5 * step, int(np.count_nonzero(moved)))


def is_kept(chosen: Chosen | None, stored: np.dtype[Any], values: Array, kept: Array, source: np.dtype[Any]) -> Array:
    """Whether entries are others as they are, rounded to nearest: what an interpolation does not change has no choice.

    Args:
        chosen: What was asked for of the rest; None for to nearest.
        stored: What the file stores the entries in.
        values: The file's, float64.
        kept: The others, float64.
        source: What those are stored in.
    """
    found = values == (kept if holds_all_values_of(stored, source) else kept.astype(stored).astype(np.float64))
    if chosen is not None and chosen.widened:
        found |= values == chosen.served(kept, source)
    return np.asarray(found)


@dataclass(frozen=True)
class Results:
    """What `preserve` aims at in a piece of a matrix, inputs by outputs, float64."""

    ideal: Array
    """The results."""
    error: Array
    """What was chosen, less those."""
    step: Array
    """See `Chosen.step`."""
    slack: Array
    """How far a float32 computation of the results may be off."""
    loose: Array
    """The part of the slack that is one factor on all of an output: that of a norm. Outputs alone."""


class Walk:
    """The choices of ``preserve`` in one matrix, along its inputs.

    With u_i the rows of U, t_i the results of one output, c_i the neighbours that were chosen, ``e_i = c_i - t_i`` and
    ``s_i = sum over j < i of u_j e_j``, c_i is right if the other neighbour, ``c_i + D``, costs no less: if

        D * (2 u_i . s_i + w_i (2 e_i + D)) >= 0,   w_i = |u_i|^2 + penalty

    A merge, in float32, sees s with the errors of all t before: by at most the root of the sum of their squares (Cauchy-Schwarz:
    U's columns are orthonormal), plus ``k 2^-24`` times the largest s so far for k additions, plus ``(4 kappa + rank + 64) 2^-24``
    times the sum of ``|u_j| |e_j|``, kappa being the condition of lora_a, which says how its span moves with its roundings. What
    is decided by less than that, and by twice w_i times the slack of t_i, is free; so is what is on the grid but for its slack.
    A relative error that all results of an output share, that of DoRA's norm, enters s as that part of ``U^T t``.

    Args:
        chosen: What was asked for.
        basis: U, inputs by rank, float64, whose columns of zeros count as none.
        a: lora_a, inputs by rank, float64.
        outputs: The extents of the output dims.
    """

    def __init__(self, chosen: Chosen, basis: Array, a: Array, outputs: tuple[int, ...]) -> None:
        self._chosen = chosen
        # What the adapter does not look at is to nearest; roundings of a zero would be something to look at.
        self._basis = np.where(a.any(axis=1, keepdims=True), basis, 0.0)
        rank = np.count_nonzero(basis.any(axis=0))
        self._penalty = penalty(chosen.mu, int(rank), len(basis))
        singular = np.linalg.svd(a, compute_uv=False)[:rank]
        condition = singular[0] / singular[-1] if rank else 1.0
        self._sensitivity = (4 * condition + basis.shape[1] + _GROUP) * _EPSILON
        self._sums = np.zeros((basis.shape[1], *outputs))
        self._results = np.zeros((basis.shape[1], *outputs))
        self._doubt_sq, self._path, self._largest, self._largest_result = (np.zeros(outputs) for _ in range(4))
        self._done = np.zeros(outputs, np.int64)

    def judge(self, first: int, outputs: Region, found: Results, shares: Array) -> None:
        """Judge a piece. Those of one output come one after the other, from its first input to its last.

        Args:
            first: The piece's first input; all of its inputs lie one behind the other.
            outputs: Which outputs it has.
            found: What was found there.
            shares: Inputs by outputs. Where a choice is less right than it is off already, by how much as a share of its leeway.

        Raises:
            RuntimeError: The piece is not the next one.
        """
        done = self._done[outputs]
        if not (done == first).all():
            raise RuntimeError("a walk along the inputs is judged in its order")
        where = (slice(None), *outputs)
        rank, shape = len(self._sums), done.shape
        sums, results = (values[where].reshape(rank, -1) for values in (self._sums, self._results))
        named = (self._doubt_sq, self._path, self._largest, self._largest_result)
        doubt_sq, path, largest, largest_result = (values[outputs].reshape(-1) for values in named)
        for start in range(0, len(found.error), _GROUP):
            rows = slice(start, start + _GROUP)
            error, slack, ideal = (np.ascontiguousarray(v[rows]) for v in (found.error, found.slack, found.ideal))
            # An entry that is no number is wrong as such.
            np.copyto(error, 0.0, where=~np.isfinite(error))
            basis = self._basis[first + start : first + start + len(error)]
            size_sq = np.square(basis).sum(axis=1)
            size = np.sqrt(size_sq)
            swing = size @ np.abs(error)
            path = path + swing
            largest = np.maximum(largest, np.sqrt(np.square(sums).sum(axis=0)) + swing)
            doubt_sq = doubt_sq + np.square(slack).sum(axis=0)
            doubt = np.sqrt(doubt_sq) + self._sensitivity * path
            doubt += (first + start + len(error) + rank) * _EPSILON * largest
            if found.loose.any():
                largest_result = np.maximum(
                    largest_result, np.sqrt(np.square(results).sum(axis=0)) + size @ np.abs(ideal)
                )
                doubt += found.loose * largest_result
                results = results + basis.T @ ideal
                slack = slack + found.loose * np.abs(ideal)
            along = basis @ sums
            along += np.tril(basis @ basis.T, -1) @ error
            sums = sums + basis.T @ error
            self._weigh(shares[rows], found.step[rows], ideal, error, slack, along, size_sq, size[:, None] * doubt)
        self._sums[where] = sums.reshape(rank, *shape)
        self._results[where] = results.reshape(rank, *shape)
        for values, after in zip(named, (doubt_sq, path, largest, largest_result), strict=True):
            values[outputs] = after.reshape(shape)
        self._done[outputs] += len(found.error)

    def _weigh(
        self,
        shares: Array,
        step: Array,
        ideal: Array,
        error: Array,
        slack: Array,
        along: Array,
        size_sq: Array,
        doubt: Array,
    ) -> None:
        """Whether the other neighbours would have been better, by more than could be seen."""
        weight = (size_sq + self._penalty)[:, None]
        off = np.abs(error)
        # The other neighbour lies beyond the result: D has the sign of -e.
        regret = 2 * np.sign(error) * along
        regret -= weight * (step - 2 * off)
        leeway = 2 * doubt + weight * (2 * slack + 16 * _EPSILON * step)
        # Without any weight there is nothing to weigh but which is nearer.
        np.copyto(regret, 2 * off - step, where=weight == 0)
        np.copyto(leeway, 2 * slack, where=weight == 0)
        free = (off <= slack) | (off > step) | ~self._chosen.has_choice(ideal)
        share = np.divide(regret, leeway, out=np.zeros_like(regret), where=~free & (regret > 0))
        np.maximum(shares, share, out=shares)
