"""Interpolation in weight space, jitted: what runs on the device, tile by tile.

``W = base + alpha * (tuned - base)``, Wise-FT's equation (arXiv:2109.01903, section 3) with one product less.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_merge_cli.dtypes import dtype_named
from lora_merge_cli.records import Array
from lora_merge_cli.rounding import Choice
from lora_merge_cli.rounding_numerics import drawn, neighbours, stored
from lora_merge_cli.survival import Moments, Realised
from lora_merge_cli.tiles import Tile, TileResult, as_bits, narrowed, over_tiles, pytree, rounded, widened

TILE_ENTRIES = 2**16
BLOCK_ENTRIES = 2**22
"""The most entries that one call computes."""
_GROWTH = 8


@pytree
@dataclass(frozen=True)
class _RealisedSums:
    """Sums for one dtype, per tile, in squared units; see `survival.Realised`."""

    error_dot_d: Any
    """``<q - d, d>``. What rounding loses is much smaller than ``d``, so this keeps more of it than ``<q, d>`` would."""
    error_sq: Any
    unchanged: Any


@pytree
@dataclass(frozen=True)
class _Sums:
    """Sums over each tile, whatever the dtype."""

    unit: Any
    """What changes are counted in: a power of two about the largest, so that squares in float32 neither overflow nor vanish."""
    largest: Any
    """The largest size of a change, in units."""
    delta_sq: Any
    """In squared units."""
    realised: dict[str, _RealisedSums]
    """By the name of the dtype."""
    nearest: _RealisedSums | None
    """Where there was a choice: what rounding to nearest would have left."""
    moved: Any
    """Where a choice was made for a narrower dtype than the stored one: entries that are not the exact result."""


def mix_block(
    tuned: Array,
    base: Array,
    alpha: float,
    *,
    dtype: str,
    serving_dtype: str,
    device: Any,
    choice: Choice | None = None,
    bits: Array | None = None,
) -> tuple[Array, Moments]:
    """``base + alpha * (tuned - base)`` in float32, rounded once to `dtype`.

    An entry that has one value on both sides keeps it, NaN and Inf included, and adds nothing to the sums.
    ``(1 - alpha) * base + alpha * tuned`` takes over where a difference of finite values overflows.
    Subnormal numbers of float32 count as zeros where the device flushes them.

    Law: an entry's result depends on its two values, alpha, the dtypes and its random bits alone, to the bit.

    Args:
        tuned: A run of at most `BLOCK_ENTRIES` entries, one axis, any floating dtype but float64.
        base: As many, of any such dtype.
        alpha: 0 is the base, 1 is `tuned`, to the bit; rounded to float32.
        dtype: The name of the dtype to round to.
        serving_dtype: The name of the dtype that a server will cast to; survival is measured for both.
        device: The JAX device to compute on.
        choice: How what moved is rounded stochastically; None to nearest.
        bits: 16 random bits for each entry, uint16; None to nearest.

    Returns:
        The values, and the sums of ``d = alpha * (tuned - base)`` and of what rounding leaves of it, without the base's own norm.
        Sums of NaN, Inf or results that overflow are not finite, nor is `error_sq` where all changes are below 2^-50 of the base.
    """
    entries = tuned.size
    tiles = -(-entries // TILE_ENTRIES)
    capacity = TILE_ENTRIES
    while capacity < entries:
        capacity *= _GROWTH
    with np.errstate(over="ignore"):
        scalars = np.float32(alpha), np.int32(tiles)
    runs = (None if each is None else _padded(as_bits(each), capacity) for each in (tuned, base, bits))
    arguments = jax.device_put((*runs, *scalars), device)
    names = tuned.dtype.name, base.dtype.name, dtype, serving_dtype
    values, found = jax.device_get(_mix(TILE_ENTRIES, names, choice, *arguments))
    squared_unit = np.square(found.unit.astype(np.float64))
    padding = tiles * TILE_ENTRIES - entries

    def total(sums: Array) -> float:
        return float(np.sum(sums * squared_unit))

    def realised(sums: _RealisedSums) -> Realised:
        return Realised(
            q_dot_d=delta_sq + total(sums.error_dot_d),
            error_sq=total(sums.error_sq),
            unchanged=int(np.sum(sums.unchanged, dtype=np.float64)) - padding,
        )

    with np.errstate(invalid="ignore"):
        delta_sq = total(found.delta_sq)
        moments = Moments(
            delta_sq=delta_sq,
            max_abs=float(np.max(found.largest * found.unit.astype(np.float64))),
            entries=entries,
            realised={name: realised(sums) for name, sums in found.realised.items()},
            nearest=None if found.nearest is None else realised(found.nearest),
            moved=0 if found.moved is None else int(np.sum(found.moved, dtype=np.float64)),
        )
    return values[:entries].view(dtype_named(dtype)), moments


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _mix(
    tile_entries: int,
    names: tuple[str, str, str, str],
    choice: Choice | None,
    tuned: Any,
    base: Any,
    bits: Any,
    alpha: Any,
    tiles: Any,
) -> tuple[Any, _Sums]:
    tuned_dtype, base_dtype, dtype, serving_dtype = names

    def mix(tile: Tile) -> TileResult:
        t, b = widened(tile.rows(tuned), tuned_dtype), widened(tile.rows(base), base_dtype)
        same = (t == b) | (jnp.isnan(t) & jnp.isnan(b))
        change = alpha * (t - b)
        mixed = jnp.where(jnp.isfinite(change), b + change, (1 - alpha) * b + alpha * t)
        exact = jnp.where(same | (alpha == 1), t, mixed)
        result = rounded(exact, dtype)
        if choice is not None:
            chosen = drawn(exact, neighbours(exact, choice.grid), tile.rows(bits))
            result = jnp.where(same, result, stored(exact, chosen, choice, dtype))

        # Sums are of halves: twice the largest float32 is none.
        half_d = jnp.where(same, 0, alpha * (0.5 * t - 0.5 * b))
        largest = jnp.max(jnp.abs(half_d))
        unit = _power_of_two(largest)
        per_unit = 1 / unit
        d = half_d * per_unit
        uncounted = same & ~jnp.isfinite(t)

        def realised(kept: Any, name: str) -> _RealisedSums:
            q = jnp.where(uncounted, 0, (0.5 * kept - 0.5 * rounded(b, name)) * per_unit)
            error = q - d
            return _RealisedSums(
                error_dot_d=jnp.sum(error * d),
                error_sq=jnp.sum(error * error),
                # Where q is 0, and nowhere else: another q is no less than half of d. Neither q nor anything else is computed
                # once more for it. Sums of float32 are the fast ones, and exact up to 2^24.
                unchanged=jnp.sum((error == -d).astype(jnp.float32)),
            )

        # A server casts what is stored, so the stored values are what it rounds once more.
        served = {name: result if name == dtype else rounded(result, name) for name in (dtype, serving_dtype)}
        sums = _Sums(
            unit=2 * unit,
            largest=largest * per_unit,
            delta_sq=jnp.sum(d * d),
            realised={name: realised(kept, name) for name, kept in served.items()},
            nearest=None if choice is None else realised(rounded(exact, choice.grid), choice.grid),
            moved=None if choice is None or choice.grid == dtype else jnp.sum((result != exact).astype(jnp.float32)),
        )
        return TileResult(per_row=narrowed(result, dtype), per_tile=sums, per_matrix={})

    found = over_tiles(mix, tile_entries, tuned.shape[0], 1, tiles)
    return found.per_row, found.per_tile


def _power_of_two(size: Any) -> Any:
    """The largest power of two that is no larger, within what float32 can square and sum; the largest such for NaN and Inf."""
    exponent = jax.lax.bitcast_convert_type(size, jnp.uint32) & jnp.uint32(0x7F80_0000)
    return jnp.clip(jax.lax.bitcast_convert_type(exponent, jnp.float32), 2.0**-100, 2.0**100)


def _padded(values: Array, entries: int) -> Array:
    """The values with zeros behind them, if there are fewer."""
    if values.size == entries:
        return values
    result = np.zeros(entries, values.dtype)
    result[: values.size] = values
    return result
