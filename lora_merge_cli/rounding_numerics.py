"""Roundings other than to nearest: float32, traced, for what runs on the device.

Both choose, entry by entry, between the two values of a grid (a narrow dtype's) that a result lies between.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_merge_cli.dtypes import dtype_named
from lora_merge_cli.rounding import Choice
from lora_merge_cli.tiles import rounded

_HIGHEST = jax.lax.Precision.HIGHEST
_SMALLEST = 2.0**-119
"""The steps of smaller bfloat16 values are subnormal in float32."""
_DRAWS = 2.0**16


class Neighbours(NamedTuple):
    """The two values of a grid that each entry lies between."""

    nearest: Any
    """The nearer one, ties to even."""
    step: Any
    """From there to the other one. 0 where there is no choice: the entry is on the grid, one of the two would be Inf, or the step
    is subnormal in float32, which devices flush to zero."""


def neighbours(values: Any, grid: str) -> Neighbours:
    """The values of a grid that float32 values lie between.

    Args:
        values: float32, any shape.
        grid: The name of the grid's dtype, ``bfloat16`` or ``float16``.
    """
    nearest = rounded(values, grid)
    other = _beside(nearest, values, grid)
    has_choice = (nearest != values) & jnp.isfinite(nearest) & jnp.isfinite(other)
    if grid == "bfloat16":
        has_choice &= jnp.minimum(jnp.abs(nearest), jnp.abs(other)) >= _SMALLEST
    return Neighbours(nearest, jnp.where(has_choice, other - nearest, 0))


def drawn(values: Any, found: Neighbours, bits: Any) -> Any:
    """The neighbour further from zero with the probability that keeps the mean; to 2^-16 of a step.

    Args:
        values: float32.
        found: Their neighbours.
        bits: 16 random bits each; uint16.
    """
    has_choice = found.step != 0
    # Both are exact: a step is a power of two.
    share = jnp.abs(values - found.nearest) / jnp.where(has_choice, jnp.abs(found.step), 1)
    is_inner = jnp.abs(found.nearest) < jnp.abs(found.nearest + found.step)
    draw = bits.astype(jnp.float32)
    other = jnp.where(is_inner, draw < share * _DRAWS, draw >= (1 - share) * _DRAWS)
    # Not a sum with 0, which would lose the sign of -0.
    return jnp.where(has_choice & other, found.nearest + found.step, found.nearest)


def preserved(values: Any, found: Neighbours, basis: Any, penalty: Any, carry: Any) -> tuple[Any, Any]:
    """Error feedback in the space of the inputs that an adapter reacts to.

    With ``u_i`` a row of U, an orthonormal basis of lora_a's columns, and e the error that a choice for input i leaves in one
    output, the walk along the inputs takes of the two neighbours the one with the smaller

        |s + u_i e|^2 + penalty e^2,   s = sum over the inputs before of u_j e_j

    for each output by itself; the nearer one on a tie. All that an adapter's inputs have in common with U's span see of the errors
    together is s, which stays about as large as a single one. The second term keeps the errors small as such: what all other
    inputs see. Summed over the inputs the two are ``|U^T E|^2 + penalty |E|^2``.

    Args:
        values: Inputs by outputs, float32.
        found: Their neighbours.
        basis: U, inputs by rank, float32.
        penalty: What the second term counts; from 0.
        carry: s of the inputs before these, rank by outputs, float32.

    Returns:
        The chosen neighbours, and s of all inputs so far.
    """
    weights = jnp.sum(basis * basis, axis=-1) + penalty
    # What the grid does not reach would be an error for all inputs after it.
    errors = jnp.where(jnp.isfinite(found.nearest), found.nearest - values, 0)

    def choose(s: Any, entry: tuple[Any, Any, Any, Any]) -> tuple[Any, Any]:
        u, weight, error, step = entry
        # What the other neighbour costs more, over the step: its sign decides, and no square underflows.
        difference = 2 * jnp.dot(u, s, precision=_HIGHEST) + weight * (2 * error + step)
        taken = jnp.where(step * jnp.sign(difference) < 0, step, 0)
        return s + u[:, None] * (error + taken)[None, :], taken

    # Storage dtypes stay out of the loop: XLA's CPU backend would convert all of its result in each turn.
    carry, taken = jax.lax.scan(choose, carry, (basis, weights, errors, found.step))
    return jnp.where(taken == 0, found.nearest, found.nearest + taken), carry


def stored(exact: Any, chosen: Any, choice: Choice, dtype: str) -> Any:
    """What is stored so that the chosen values are served.

    Args:
        exact: The exact results, float32.
        chosen: The values chosen for them.
        choice: How.
        dtype: The name of the dtype to store.

    Returns:
        float32: the chosen values themselves in a file of their own dtype, or if they are asked for; else the exact result where it
        casts to the chosen value and is no midpoint, and elsewhere the float32 number just past the midpoint between the chosen
        value and its neighbour towards the result. So any way of breaking ties leads to the chosen one.
    """
    if dtype == choice.grid or choice.widened:
        return chosen
    beside = _beside(chosen, exact, choice.grid)
    middle = 0.5 * chosen + 0.5 * beside
    bits = jax.lax.bitcast_convert_type(middle, jnp.uint32)
    past = jnp.where(jnp.abs(chosen) > jnp.abs(middle), bits + 1, bits - 1)
    moved = jax.lax.bitcast_convert_type(past, jnp.float32)
    return jnp.where((rounded(exact, choice.grid) == chosen) & (exact != middle), exact, moved)


def _beside(on_grid: Any, values: Any, grid: str) -> Any:
    """The neighbours of values of a grid, in the direction of other values."""
    outwards = jnp.where(on_grid == 0, True, (values > on_grid) == (on_grid > 0))
    signed = jnp.where(on_grid == 0, jnp.copysign(on_grid, values), on_grid)
    if grid == "bfloat16":
        # Its values are those of float32 with zeros in the lower half.
        bits, one = jax.lax.bitcast_convert_type(signed, jnp.uint32), jnp.uint32(1 << 16)
        return jax.lax.bitcast_convert_type(jnp.where(outwards, bits + one, bits - one), jnp.float32)
    bits = jax.lax.bitcast_convert_type(signed.astype(dtype_named(grid)), jnp.uint16)
    beside = jnp.where(outwards, bits + jnp.uint16(1), bits - jnp.uint16(1))
    return jax.lax.bitcast_convert_type(beside, dtype_named(grid)).astype(jnp.float32)
