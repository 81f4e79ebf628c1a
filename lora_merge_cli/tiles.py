"""Blocks in tiles on the device, and how values travel there.

A block is a run of rows that one call computes, tile by tile: a tile fits a cache, a call is worth its overhead. Storage dtypes
narrower than float32 travel as integers of their width: XLA's CPU backend has no arithmetic in them, and would convert a whole
block to float32 and back for each tile that is cut out of it or put into it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from lora_merge_cli.dtypes import dtype_named
from lora_merge_cli.records import Array

T = TypeVar("T")


def pytree(cls: type[T]) -> type[T]:
    """Let JAX take a dataclass of arrays as an argument and a result."""
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return jax.tree_util.register_dataclass(cls, names, [])


class Tile(NamedTuple):
    """Where a tile lies in its block."""

    first: Any
    """Its first row."""
    height: int
    """How many rows it has."""
    index: Any
    """Which of the block's matrices it is a part of."""

    def rows(self, values: Any) -> Any:
        """Its part of what has an entry, or a row, per row of the block."""
        return jax.lax.dynamic_slice_in_dim(values, self.first, self.height)

    def matrix(self, values: Any) -> Any:
        """Its part of what is given per matrix."""
        return jax.lax.dynamic_index_in_dim(values, self.index, keepdims=False)


class TileResult(NamedTuple):
    """What is made of a tile, and, stacked or summed, of a block. Trees of arrays."""

    per_row: Any
    """With a leading axis of rows; of a block those of all its rows."""
    per_tile: Any
    """Of a block with a leading axis of tiles."""
    per_matrix: Any
    """Added up over the tiles of a matrix; of a block with a leading axis of matrices."""


def over_tiles(compute: Callable[[Tile], TileResult], height: int, rows: int, matrices: int, tiles: Any) -> TileResult:
    """Compute so many tiles one after the other; a loop of the device's own, so that its length is no part of the program."""
    found, _ = in_turn(lambda tile, carry: (compute(tile), carry), (), height, rows, matrices, tiles)
    return found


def in_turn(
    compute: Callable[[Tile, Any], tuple[TileResult, Any]],
    carry: Any,
    height: int,
    rows: int,
    matrices: int,
    tiles: Any,
) -> tuple[TileResult, Any]:
    """As `over_tiles`, where each tile takes a tree of arrays from the one before; every matrix but the first starts from zeros."""
    count = rows // height
    per_matrix = max(1, count // matrices)
    shapes, _ = jax.eval_shape(lambda before: compute(Tile(0, height, 0), before), carry)

    def zeros(leading: int, like: Any, axes: int) -> Any:
        return jax.tree.map(lambda one: jnp.zeros((leading, *one.shape[axes:]), one.dtype), like)

    def step(number: Any, so_far: tuple[TileResult, Any]) -> tuple[TileResult, Any]:
        seen, before = so_far
        first, index = number * height, number // per_matrix
        starts = (number > 0) & (number % per_matrix == 0)
        before = jax.tree.map(lambda one: jnp.where(starts, jnp.zeros_like(one), one), before)
        found, after = compute(Tile(first, height, index), before)

        def stacked(at: Any) -> Callable[[Any, Any], Any]:
            return lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, at, 0)

        result = TileResult(
            jax.tree.map(stacked(first), seen.per_row, found.per_row),
            jax.tree.map(lambda whole, part: stacked(number)(whole, part[None]), seen.per_tile, found.per_tile),
            jax.tree.map(lambda whole, part: whole.at[index].add(part), seen.per_matrix, found.per_matrix),
        )
        return result, after

    start = TileResult(
        zeros(rows, shapes.per_row, 1), zeros(count, shapes.per_tile, 0), zeros(matrices, shapes.per_matrix, 0)
    )
    result: tuple[TileResult, Any] = jax.lax.fori_loop(0, tiles, step, (start, carry))
    return result


def as_bits(values: Array) -> Array:
    """Values of a narrow dtype as integers of its width."""
    return values if values.dtype.itemsize >= 4 else values.view(f"u{values.dtype.itemsize}")


def widened(bits: Any, dtype: str) -> Any:
    """What `as_bits` made of values, as float32."""
    stored = dtype_named(dtype)
    return (bits if stored.itemsize >= 4 else jax.lax.bitcast_convert_type(bits, stored)).astype(jnp.float32)


def narrowed(values: Any, dtype: str) -> Any:
    """float32 values that lie on the grid of a dtype, as what `as_bits` makes of that dtype."""
    stored = dtype_named(dtype)
    if stored.itemsize >= 4:
        return values.astype(stored)
    return jax.lax.bitcast_convert_type(values.astype(stored), jnp.dtype(f"u{stored.itemsize}"))


def rounded(values: Any, dtype: str) -> Any:
    """float32 values on the grid of a dtype."""
    if dtype == "bfloat16":
        # XLA may drop a cast to bfloat16 and back as excess precision; it never drops this.
        return jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
    return values.astype(dtype_named(dtype)).astype(jnp.float32)
