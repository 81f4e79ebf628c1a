"""One leaf without an adapter being interpolated, block by block, between what the base and the fine-tune hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_merge_cli.compare import count_non_finite, equals_rounded
from lora_merge_cli.dtypes import FLOAT32, holds_all_values_of
from lora_merge_cli.errors import LoraMergeError, NonFiniteInput, Unrepresentable
from lora_merge_cli.records import Array
from lora_merge_cli.rounding import Choice
from lora_merge_cli.survival import Moments, Realised

_GLANCE = 2**12
_CHUNK = 2**16


@dataclass(frozen=True)
class Computed:
    """An interpolated block."""

    values: Array
    """In the stored dtype, in the block's shape."""
    moments: Moments
    """Its sums."""
    refusal: LoraMergeError | None
    """Why the values must not be used, if so."""


class MixedLeaf:
    """One leaf being interpolated, block by block: ``W = base + alpha * (tuned - base)``, in float32, rounded once.

    Blocks may be computed at the same time, and are taken one after the other. What needs no arithmetic gets none:

    - At alpha 0 the result is the base, at alpha 1 the fine-tune, each cast to the stored dtype: -0.0, NaN and Inf survive. With a
      choice of rounding, what the fine-tune moved has it at alpha 1 too.
    - An entry that has one value on both sides keeps it.
    - Nor, rounded to nearest, does a block that did not move, the fine-tune being the base rounded to its own dtype, where the
      result would be rounded to that dtype again: whatever lies between a value and what it rounds to rounds to the same.

    Law: an entry's result depends on its two values, alpha, the dtypes and, where it draws, its random bits alone.

    Args:
        where: The fine-tune's leaf as errors name it.
        base_where: The base's leaf as errors name it.
        dtype: What the result is stored in.
        serving_dtype: What a server will cast it to.
        device: The JAX device to compute on.
        choice: Which of two neighbours is stored of what moved; None for the nearer one.
    """

    def __init__(
        self,
        where: str,
        base_where: str,
        dtype: np.dtype[Any],
        serving_dtype: np.dtype[Any],
        device: Any,
        choice: Choice | None = None,
    ) -> None:
        if choice is not None and choice.method != "stochastic":
            raise ValueError(f"{choice.method} is of what has a low-rank input space")
        self._where, self._base_where, self._choice = where, base_where, choice
        self._dtype, self._serving_dtype, self._device = dtype, serving_dtype, device
        self._moments = Moments()

    def compute(self, tuned: Array, base: Array, alpha: float, bits: Array | None = None) -> Computed:
        """Compute one block; keeps nothing, so any thread may.

        Args:
            tuned: The fine-tune's values, any shape and any floating dtype but float64.
            base: The base's, in the same shape and any such dtype.
            alpha: 0 is the base, 1 the fine-tune.
            bits: 16 random bits for each entry; None if it takes none.
        """
        if alpha == 0:
            return self._selected(base, base, self._base_where)
        if self._ends_where_it_was(tuned, base, alpha):
            return self._selected(tuned, base, self._where)
        values, moments = self._mixed(tuned, base, alpha, bits)
        if alpha == 1 and self._choice is not None:
            return Computed(values, moments, self._overflow(tuned, values, self._where))
        if alpha == 1:
            values = _cast(tuned, self._dtype)
            return Computed(values, moments, self._overflow(tuned, values, self._where))
        # A sum that is finite has finite terms; others need a look at the values themselves.
        finite = math.isfinite(moments.realised[self._dtype.name].error_sq)
        return Computed(values, moments, None if finite else self._refusal(tuned, base, values))

    def take(self, computed: Computed) -> Array:
        """Check a computed block, add its sums, and return its values.

        Raises:
            NonFiniteInput: At an alpha other than 0 and 1, an entry is NaN or Inf on one side, and not the same on the other.
            Unrepresentable: The result of finite values is not finite in the stored dtype.
        """
        if computed.refusal is not None:
            raise computed.refusal
        self._moments.add(computed.moments)
        return computed.values

    def finish(self) -> Moments:
        """The sums over all blocks that were taken, of the change ``alpha * (tuned - base)`` against the base.

        There is no adapter, so what is said along an adapter's inputs stays 0. At alpha 1 the sums are not finite where a change
        is none.
        """
        return self._moments

    def _ends_where_it_was(self, tuned: Array, base: Array, alpha: float) -> bool:
        """Whether a block did not move, and the arithmetic would say so too."""
        again = self._choice is None and self._dtype == tuned.dtype and 0 <= alpha <= 1
        rounds_back = base.dtype == tuned.dtype or again
        return not tuned.size or (rounds_back and _did_not_move(tuned, base))

    def _selected(self, values: Array, base: Array, where: str) -> Computed:
        """One side's values as they are, and the figures of no change."""
        result = _cast(values, self._dtype)
        moments = moments_of_no_change(base, (self._dtype.name, self._serving_dtype.name))
        return Computed(result, moments, self._overflow(values, result, where))

    def _mixed(self, tuned: Array, base: Array, alpha: float, bits: Array | None) -> tuple[Array, Moments]:
        from lora_merge_cli.mixing_numerics import BLOCK_ENTRIES, mix_block

        runs = [slice(first, first + BLOCK_ENTRIES) for first in range(0, tuned.size, BLOCK_ENTRIES)]
        t, b = tuned.reshape(-1), base.reshape(-1)
        mixed = [
            mix_block(
                t[run],
                b[run],
                alpha,
                dtype=self._dtype.name,
                serving_dtype=self._serving_dtype.name,
                device=self._device,
                choice=self._choice,
                bits=None if bits is None else bits[run],
            )
            for run in runs
        ]
        values = mixed[0][0] if len(mixed) == 1 else np.concatenate([values for values, _ in mixed])
        moments = Moments.total([Moments(kernel_sq=_sum_of_squares(base)), *(moments for _, moments in mixed)])
        return values.reshape(tuned.shape), moments

    def _refusal(self, tuned: Array, base: Array, values: Array) -> LoraMergeError | None:
        """What is wrong with a block whose sums are not finite; None if they merely overflow."""
        t, b = tuned.astype(FLOAT32), base.astype(FLOAT32)
        same = (t == b) | (np.isnan(t) & np.isnan(b))
        for where, side in ((self._where, t), (self._base_where, b)):
            bad = np.count_nonzero(~np.isfinite(side) & ~same)
            if bad:
                return NonFiniteInput(
                    "a leaf to interpolate is not finite",
                    where=where,
                    expected="finite values, or the same ones on both sides",
                    found=f"{bad} entries NaN or Inf",
                )
        lost = np.isfinite(t) & np.isfinite(b) & ~np.isfinite(values)
        return self._too_large(int(np.count_nonzero(lost)), self._where)

    def _overflow(self, values: Array, result: Array, where: str) -> LoraMergeError | None:
        """Whether finite values stopped being finite when they were cast."""
        if holds_all_values_of(result.dtype, values.dtype):
            return None
        return self._too_large(count_non_finite(result) - count_non_finite(values), where)

    def _too_large(self, count: int, where: str) -> LoraMergeError | None:
        if not count:
            return None
        return Unrepresentable(
            f"the interpolated leaf overflows {self._dtype.name}",
            where=where,
            found=f"{count} results beyond its range",
            hint="take an alpha nearer to [0, 1]" if self._dtype == FLOAT32 else "use --dtype float32 or bfloat16",
        )


def moments_of_no_change(base: Array, dtypes: Sequence[str]) -> Moments:
    """The figures of values that stay what they are, for dtypes by name."""
    return Moments(
        kernel_sq=_sum_of_squares(base),
        entries=base.size,
        realised={name: Realised(unchanged=base.size) for name in dtypes},
    )


def _did_not_move(tuned: Array, base: Array) -> bool:
    """Whether the fine-tune is the base rounded to its own dtype, bit for bit."""
    # What moved mostly shows it at once, and is spared a pass over all of it.
    first = slice(_GLANCE)
    return equals_rounded(tuned.reshape(-1)[first], base.reshape(-1)[first]) and equals_rounded(tuned, base)


def _cast(values: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype, copy=False)


def _sum_of_squares(values: Array) -> float:
    """Of the finite entries. In float32 by chunks that fit a cache, in float64 where that does not hold them."""
    flat = values.reshape(-1)
    return sum(_chunk_squares(flat[first : first + _CHUNK]) for first in range(0, flat.size, _CHUNK))


def _chunk_squares(chunk: Array) -> float:
    narrow = chunk.astype(FLOAT32, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        squares = float(np.einsum("i,i->", narrow, narrow))
    if 1e-20 < squares < 1e30:
        return squares
    wide = narrow[np.isfinite(narrow)].astype(np.float64)
    return float(np.einsum("i,i->", wide, wide))
