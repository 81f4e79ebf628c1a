"""A leaf without an adapter, part of the way from the base to the fine-tune: entry by entry, in NumPy and float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_merge_cli.compare import equals_rounded
from lora_merge_cli.dtypes import is_float, ulp
from lora_merge_cli.records import Array, Region
from lora_merge_cli.side_by_side import flat_pieces
from lora_merge_cli.verification.choices import Chosen, compare, is_kept
from lora_merge_cli.verification.doubts import Doubts

_EPSILON = 2.0**-24
_TINY = 2.0**-126
_ROUNDINGS = 6
_CLEAR = 0.1
"""How much of the difference of the two sides may stay unexplained where one alpha is said to explain a result."""


def mixed(tuned: Array, anchor: Array, alpha: float) -> Array:
    """``A + alpha * (T - A)`` in float64; at alpha 0 and 1 the one side or the other as it is, in its own dtype."""
    if alpha == 0:
        return anchor
    if alpha == 1:
        return tuned
    before = anchor.astype(np.float64)
    return np.asarray(before + alpha * (tuned.astype(np.float64) - before))


def summands(tuned: Array, anchor: Array, alpha: float, weight: float = 0.0) -> Array:
    """The magnitudes of all that a float32 formula of a mixture adds up.

    With T and A the two sides, ``A + alpha * (T - A)`` adds ``|A| + |alpha| * |T - A|``, and ``(1 - alpha) * A + alpha * T`` adds
    ``|1 - alpha| * |A| + |alpha| * |T|``: this is the sum of both. Where T is itself such a mixture of A and something else, with
    a weight w, its own error is one of ``(1 + |w|) * |A| + |T - A|``, of which alpha takes its part.

    Args:
        tuned: T, float64.
        anchor: A, float64.
        alpha: How far to go from A to T.
        weight: The largest ``|w|``; 0 where T is exact.
    """
    step = np.subtract(tuned, anchor)
    np.abs(step, out=step)
    found = np.abs(anchor)
    found *= 1 + abs(1 - alpha) + (abs(alpha) * (1 + weight) if weight else 0.0)
    part = np.abs(tuned)
    part += step
    if weight:
        part += step
    part *= abs(alpha)
    found += part
    return np.asarray(found)


def count_other_bits(values: Array, wanted: Array) -> int:
    """How many entries of two arrays of one dtype have other bits."""
    return 0 if equals_rounded(values, wanted) else int(np.count_nonzero(_other_bits(values, wanted)))


@dataclass
class LayerMixture:
    """What was found of a leaf, or of one layer of a leaf whose layers have alphas of their own."""

    alpha: float
    """How far it should be from the base to the fine-tune."""
    wrong: int = 0
    """How many entries are not what the two sides make of them at this alpha."""
    not_kept: int = 0
    """How many are not the fine-tune's, cast, bit for bit: the wrong ones of a leaf that did not move."""
    worst_share: float = 0.0
    """The largest error of an entry as a share of its bound; Inf where bits are others than they must be."""
    step_sq: float = 0.0
    """The sum of ``(T - A)^2`` where something is wrong."""
    change_dot_step: float = 0.0
    """The sum of ``(M - A) * (T - A)`` there, M the result."""
    change_sq: float = 0.0
    """The sum of ``(M - A)^2`` there."""

    def add(self, other: LayerMixture) -> None:
        """Add what was found of another part of it."""
        self.wrong += other.wrong
        self.not_kept += other.not_kept
        self.worst_share = max(self.worst_share, other.worst_share)
        self.step_sq += other.step_sq
        self.change_dot_step += other.change_dot_step
        self.change_sq += other.change_sq

    @property
    def fitted(self) -> float | None:
        """The alpha that explains what is there, by least squares; None where none does."""
        if not 0 < self.step_sq < math.inf:
            return None
        alpha = self.change_dot_step / self.step_sq
        left = self.change_sq - alpha * self.change_dot_step
        return alpha if math.isfinite(left) and left <= _CLEAR**2 * self.step_sq else None


@dataclass(frozen=True)
class MixtureFinding:
    """What was found of one leaf."""

    layers: Mapping[int, LayerMixture]
    """By number; one for the whole leaf where it has one alpha."""
    by_layer: bool
    """Whether they are layers."""
    moved: bool
    """Whether the fine-tune moved it: its values are not the base's, rounded to their dtype."""
    one_sided: bool
    """Whether only the base has it."""
    drawn: bool = False
    """Whether it was rounded at random: one that did not move may be the fine-tune's, or what the two sides make of it."""

    @property
    def wrong(self) -> int:
        """How many entries are wrong."""
        return sum(map(self._wrong_in, self.layers.values()))

    @property
    def worst_share(self) -> float:
        """The largest error of an entry as a share of its bound."""
        if not self.moved:
            return math.inf if self.wrong else 0.0
        return max((layer.worst_share for layer in self.layers.values()), default=0.0)

    @property
    def in_words(self) -> str:
        """What the worst layer looks like: which mistake would make it."""
        number, worst = max(self.layers.items(), key=lambda item: self._wrong_in(item[1]))
        where = f"layer {number}: " if self.by_layer else ""
        return where + self._looks(worst)

    def _wrong_in(self, layer: LayerMixture) -> int:
        if not self.moved and self.drawn:
            return min(layer.wrong, layer.not_kept)
        return layer.wrong if self.moved else layer.not_kept

    def _looks(self, layer: LayerMixture) -> str:
        if self.one_sided:
            return "only the base has it, and it is not the base's"
        if not self.moved:
            return "the fine-tune did not move it, and it is not the fine-tune's, bit for bit"
        if layer.fitted is None:
            return "no alpha makes this of the two sides"
        if round(layer.fitted, 2) != round(layer.alpha, 2):
            # Adding 0 makes 0.00 of -0.00.
            return f"as if alpha were {round(layer.fitted, 2) + 0.0:.2f}, not {layer.alpha:g}"
        if layer.alpha in (0, 1):
            return f"at alpha {layer.alpha:g} it must be that side's, bit for bit"
        return "the alpha is there, and the rest is off"


class MixtureJudge:
    """Judges one leaf, block by block in any order.

    With T the fine-tune's values, A the base's and alpha between or beyond 0 and 1, the ideal is ``ref = A + alpha * (T - A)`` in
    float64, and an entry may be off by

        ulps * ulp(ref) + 6 * (2^-24 * size + 2^-126 * (1 + |alpha|))

    with ulp that of the stored dtype and `size` that of `summands`. Either formula there rounds, in float32, alpha, ``1 - alpha``
    or ``T - A``, the products and the sum, each by at most 2^-24 of itself (Higham, Accuracy and Stability of Numerical Algorithms,
    section 2.2). That comes to at most ``3 * |alpha * (T - A)| + |ref|``, or to ``|alpha * (T - A)| + |ref|`` and twice the second
    formula's summands: below ``3 * size`` in either case, and below twice that where it moves the last rounding across a power of
    two. 2^-126 is for devices that flush subnormal numbers to zero.

    Some values are not computed, and must be right bit for bit: A, cast, at alpha 0; T, cast, at alpha 1; T, cast, for entries
    where the two sides are equal; and T, cast, for a whole leaf that is A, rounded to T's dtype. Where such a leaf is stored in
    another dtype, A, cast, is right at alpha 0 too. An entry of which one side alone is NaN or Inf is wrong at any other alpha.
    Integers cannot be mixed: both sides must agree.

    Where T is itself computed, and an entry of it may be off by e, its bound is ``|alpha| * e`` more, at alpha 1 that and the last
    rounding alone; where e is 0 the entry is exact. Of an entry that has several right values the nearest one counts; see `Doubts`.

    Args:
        alphas: One for the whole leaf, or one per index of the first axis.
        dtype: The result's dtype.
        ulps: The rounding to that dtype: 0.5 to nearest, 1 otherwise.
        weight: The largest ``|w|`` of the weights that T is itself mixed with; 0 where T is exact.
        one_sided: Whether there is no T, and A is judged at alpha 0.
        chosen: How entries that are computed should have been chosen; None for to nearest.
    """

    def __init__(
        self,
        alphas: tuple[float, ...],
        dtype: np.dtype[Any],
        ulps: float,
        weight: float = 0.0,
        *,
        one_sided: bool = False,
        chosen: Chosen | None = None,
    ) -> None:
        self._chosen = chosen
        self._dtype, self._ulps, self._weight = dtype, ulps, weight
        self._by_layer, self._one_sided = len(alphas) > 1, one_sided
        self._layers = {number: LayerMixture(alpha) for number, alpha in enumerate(alphas)}
        self._moved = bool(weight) or one_sided
        self.not_finite = 0
        """Entries that are NaN or Inf, and finite on the side that they come from."""
        self.not_finite_before = 0
        """Entries that are NaN or Inf, and so on the side that they come from."""

    def take(
        self,
        layer: int,
        tuned: Array,
        anchor: Array,
        merged: Array,
        pool: ThreadPoolExecutor,
        doubts: Doubts | None = None,
        region: Region | None = None,
    ) -> None:
        """Judge one block.

        Args:
            layer: Of which layer it is; 0 where the leaf has one alpha.
            tuned: T there; of any dtype, as all three are.
            anchor: A there.
            merged: The result there.
            pool: Where to compute.
            doubts: How far the entries of T, row-major, may be off; None where they are as they are stored.
            region: Where the block lies in the leaf, which random bits depend on; None without any.
        """
        alpha = self._layers[layer].alpha

        def judge(piece: tuple[tuple[Array, ...], Doubts | None]) -> _Piece:
            (tuned, anchor, merged, *drawn), part = piece
            return self._judge(tuned, anchor, merged, drawn[0] if drawn else None, doubts=part, alpha=alpha)

        drawn = [] if self._chosen is None or region is None or not alpha else [self._chosen.bits(region)]
        for found in pool.map(judge, _with_parts(flat_pieces(tuned, anchor, merged, *drawn), doubts)):
            self._layers[layer].add(found.mixture)
            self._moved = self._moved or found.moved
            self.not_finite += found.not_finite
            self.not_finite_before += found.not_finite_before

    def finish(self) -> MixtureFinding:
        """What was found."""
        return MixtureFinding(self._layers, self._by_layer, self._moved, self._one_sided, self._chosen is not None)

    def _judge(
        self, tuned: Array, anchor: Array, merged: Array, bits: Array | None, *, doubts: Doubts | None, alpha: float
    ) -> _Piece:
        # Values beyond any range are found, and judged, by what they are not.
        with np.errstate(all="ignore"):
            as_tuned, as_anchor = tuned.astype(self._dtype, copy=False), anchor.astype(self._dtype, copy=False)
            found = LayerMixture(alpha)
            if alpha == 0:
                found.wrong = count_other_bits(merged, as_anchor)
                # Of a leaf that did not move, either side will do here.
                found.not_kept = count_other_bits(merged, as_tuned) if found.wrong else 0
            else:
                found.not_kept = count_other_bits(merged, as_tuned)
                if alpha == 1 and not self._weight and doubts is None and bits is None:
                    found.wrong = found.not_kept
                elif is_float(self._dtype):
                    found.wrong, found.worst_share = self._compared(
                        tuned, anchor, merged, as_tuned, bits, doubts, alpha
                    )
                else:
                    found.wrong = int(np.count_nonzero((merged != as_tuned) | (tuned != anchor)))
            if found.wrong and (alpha == 0 or (alpha == 1 and doubts is None)):
                found.worst_share = math.inf
            if found.wrong:
                _fit(found, tuned, anchor, merged)
            piece = _Piece(found, moved=doubts is not None or not equals_rounded(tuned, anchor))
            if is_float(self._dtype):
                bad = ~np.isfinite(merged)
                if bad.any():
                    before = ~np.isfinite((anchor if alpha == 0 else tuned).astype(np.float64))
                    piece.not_finite = int(np.count_nonzero(bad & ~before))
                    piece.not_finite_before = int(np.count_nonzero(bad & before))
        return piece

    def _compared(
        self,
        tuned: Array,
        anchor: Array,
        merged: Array,
        as_tuned: Array,
        bits: Array | None,
        doubts: Doubts | None,
        alpha: float,
    ) -> tuple[int, float]:
        """How many entries are wrong, and the largest error as a share of its bound."""
        t, a, m = (values.astype(np.float64) for values in (tuned, anchor, merged))
        share = self._shares(t, a, m, bits, None if doubts is None else doubts.error, alpha)
        if self._chosen is not None and alpha == 1:
            share[is_kept(self._chosen, self._dtype, m, t, tuned.dtype)] = 0.0
        # What both sides have is kept, and so is all of T at alpha 1, where it is exact.
        same = t == a if doubts is None else ((t == a) | (alpha == 1)) & (doubts.error == 0)
        worst = share.max(initial=0.0)
        if worst <= 1 and not same.any():
            return 0, float(worst)
        both_nan = np.isnan(t) & np.isnan(a)
        kept = ~_other_bits(merged, as_tuned) | (both_nan & np.isnan(merged))
        if self._chosen is not None and self._chosen.widened:
            kept |= is_kept(self._chosen, self._dtype, m, t, tuned.dtype)
        same |= both_nan
        share[same & kept] = 0.0
        if not self._weight:
            share[same & ~kept] = np.inf
        if doubts is not None and doubts.places.size:
            at = doubts.places
            drawn = None if bits is None else bits[at]
            np.minimum.at(share, at, self._shares(doubts.values, a[at], m[at], drawn, doubts.errors, alpha))
        return int(np.count_nonzero(share > 1)), float(share.max(initial=0.0))

    def _shares(self, t: Array, a: Array, m: Array, bits: Array | None, error: Array | None, alpha: float) -> Array:
        """The errors of some entries as shares of their bounds, all float64; Inf where either is not finite."""
        ideal = mixed(t, a, alpha)
        if error is not None and alpha == 1:
            limit: Array = error + _TINY
        else:
            limit = summands(t, a, alpha, self._weight)
            limit *= _ROUNDINGS * _EPSILON
            limit += _ROUNDINGS * _TINY * (1 + abs(alpha))
            if error is not None:
                limit += abs(alpha) * error
        if self._chosen is not None and bits is not None:
            share = compare(self._chosen, self._dtype, m, ideal, ideal, limit, bits).shares
            share[np.isnan(share) | ~np.isfinite(limit)] = np.inf
            return share
        step = ulp(ideal, self._dtype)
        step *= self._ulps
        limit += step
        share = np.subtract(m, ideal)
        np.abs(share, out=share)
        share /= limit
        # NaN is no number: whatever is not below a finite bound is beyond it.
        share[np.isnan(share) | ~np.isfinite(limit)] = np.inf
        return np.asarray(share)


@dataclass
class _Piece:
    """What was found of one piece."""

    mixture: LayerMixture
    moved: bool
    not_finite: int = field(default=0)
    not_finite_before: int = field(default=0)


def _with_parts(
    pieces: Iterable[tuple[Array, ...]], doubts: Doubts | None
) -> Iterator[tuple[tuple[Array, ...], Doubts | None]]:
    """Each piece of a block with its part of the doubts."""
    start = 0
    for piece in pieces:
        stop = start + piece[0].size
        yield piece, None if doubts is None else doubts.part(start, stop)
        start = stop


def _fit(found: LayerMixture, tuned: Array, anchor: Array, merged: Array) -> None:
    """Add the sums of a piece in which something is wrong."""
    t, a, m = (values.astype(np.float64) for values in (tuned, anchor, merged))
    usable = np.isfinite(t) & np.isfinite(a) & np.isfinite(m)
    step, change = (t - a)[usable], (m - a)[usable]
    found.step_sq = float(np.dot(step, step))
    found.change_dot_step = float(np.dot(change, step))
    found.change_sq = float(np.dot(change, change))


def _other_bits(values: Array, wanted: Array) -> Array:
    """Which entries of two arrays of one dtype have other bits."""
    unit = f"u{values.dtype.itemsize}" if values.dtype.itemsize in (1, 2, 4, 8) else f"V{values.dtype.itemsize}"
    one, other = (np.ascontiguousarray(each).reshape(-1).view(unit) for each in (values, wanted))
    return np.asarray(one != other)
