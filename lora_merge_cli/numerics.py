"""The float32 kernels, jitted: what runs on the device.

A block is a run of rows that one call computes, tile by tile: a tile fits a cache, a call is worth its overhead. Storage dtypes
narrower than float32 travel as integers of their width: XLA's CPU backend has no arithmetic in them, and would convert a whole
block to float32 and back for each tile that is cut out of it or put into it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_merge_cli.dtypes import dtype_named
from lora_merge_cli.records import Array

_HIGHEST = jax.lax.Precision.HIGHEST

T = TypeVar("T")


def _pytree(cls: type[T]) -> type[T]:
    """Let JAX take a dataclass of arrays as an argument and a result."""
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return jax.tree_util.register_dataclass(cls, names, [])


@_pytree
@dataclass(frozen=True)
class Block:
    """What one call computes from: B matrices of M rows by N columns each, in tiles of some rows, B * M being whole tiles.

    Rows are inputs and columns outputs; the other way round if the kernel is outputs first. A block is a part of one matrix
    (B = 1), or several whole ones.
    """

    kernel: Any
    """What the checkpoint holds, (B * M, N), any floating dtype."""
    base: Any
    """What the delta is added to instead, or None; as `kernel`."""
    left: Any
    """The rows' part of the delta, (B * M, rank), float32."""
    right: Any
    """The columns' part of the delta, (B, rank, N), float32."""
    basis: Any
    """Q, an orthonormal basis of lora_a's columns: (B * M, rank), or (B, N, rank) if outputs first; float32."""
    gain: Any
    """What `kernel` or `base` is multiplied by besides 1, per output: (B, N), or (B * M) if outputs first; float32. None for 0."""
    unit: Any
    """About the size of the delta. Squares are summed in squared units, so that float32 neither overflows nor loses them."""
    tiles: Any
    """How many tiles to compute. Rows behind them come back as zeros."""


@_pytree
@dataclass(frozen=True)
class RealisedSums:
    """Sums of one block for one dtype, in squared units; see `survival.Realised`."""

    error_sq: Any
    """Per row."""
    unchanged: Any
    """Per row."""
    projected: Any
    """``Q^T q``, (B, rank, N); transposed, (B * M, rank), if the kernel is outputs first."""
    q_dot_d: Any
    """Per row where there is a gain. Without one, ``d`` lies in Q's span and `projected` says it."""


@_pytree
@dataclass(frozen=True)
class FusedBlock:
    """A fused block and its sums, as NumPy arrays."""

    values: Any
    """(B * M, N), in the stored dtype."""
    kernel_sq: Any
    """Per row."""
    max_abs: Any
    """Of the delta, per tile."""
    realised: dict[str, RealisedSums]
    """By the name of the dtype."""
    delta_sq: Any
    """Per row in squared units, where there is a gain. Without one the factors say it."""
    projected_delta: Any
    """``Q^T d``, as `RealisedSums.projected`, where there is a gain."""


def fuse_block(
    block: Block, *, tile_rows: int, outputs_first: bool, dtype: str, serving_dtype: str, device: Any
) -> FusedBlock:
    """``(1 + gain) * (base or kernel) + left @ right`` in float32, rounded once to `dtype`.

    Args:
        block: NumPy arrays.
        tile_rows: The rows of a tile.
        outputs_first: Whether the kernel is outputs by inputs.
        dtype: The name of the dtype to round to.
        serving_dtype: The name of the dtype that a server will cast to; survival is measured for both.
        device: The JAX device to compute on.
    """
    sources = tuple(None if values is None else values.dtype.name for values in (block.kernel, block.base))
    carried = dataclasses.replace(block, kernel=_as_bits(block.kernel), base=_as_bits(block.base))
    fused = _fuse(tile_rows, outputs_first, sources, dtype, serving_dtype, jax.device_put(carried, device))
    found: FusedBlock = jax.device_get(fused)
    return dataclasses.replace(found, values=found.values.view(dtype_named(dtype)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _fuse(
    tile_rows: int,
    outputs_first: bool,
    sources: tuple[str, str | None],
    dtype: str,
    serving_dtype: str,
    block: Block,
) -> FusedBlock:
    def fuse(tile: Tile) -> TileResult:
        kernel = _widened(tile.rows(block.kernel), sources[0])
        changed = kernel if sources[1] is None else _widened(tile.rows(block.base), sources[1])
        delta = jnp.dot(tile.rows(block.left), tile.matrix(block.right), precision=_HIGHEST)
        if block.gain is None:
            result = changed + delta
        else:
            gain = tile.rows(block.gain)[:, None] if outputs_first else tile.matrix(block.gain)[None, :]
            result = (1 + gain) * changed + delta
            delta = gain * changed + delta

        def projected(values: Any) -> Any:
            if outputs_first:
                return jnp.dot(values, tile.matrix(block.basis), precision=_HIGHEST)
            return jnp.dot(tile.rows(block.basis).T, values, precision=_HIGHEST)

        stored = _rounded(result, dtype)
        per_unit = 1 / block.unit
        per_row = {"values": _narrowed(stored, dtype), "kernel_sq": jnp.sum(kernel * kernel, axis=-1)}
        projections = {}
        for name in dict.fromkeys((dtype, serving_dtype)):
            # A server casts what is stored, so the stored values are what it rounds once more.
            served = stored if name == dtype else _rounded(stored, name)
            q = served - (kernel if sources[0] == name else _rounded(kernel, name))
            error = (q - delta) * per_unit
            per_row[f"error_sq {name}"] = jnp.sum(error * error, axis=-1)
            per_row[f"unchanged {name}"] = jnp.sum(q == 0, axis=-1, dtype=jnp.int32)
            projections[name] = projected(q)
            if block.gain is not None:
                per_row[f"q_dot_d {name}"] = jnp.sum((q * per_unit) * (delta * per_unit), axis=-1)
        if block.gain is not None:
            per_row["delta_sq"] = jnp.sum(jnp.square(delta * per_unit), axis=-1)
            projections["delta"] = projected(delta)
        return TileResult(
            per_row=per_row | ({"projected": projections} if outputs_first else {}),
            per_tile={"max_abs": jnp.max(jnp.abs(delta))},
            per_matrix={} if outputs_first else {"projected": projections},
        )

    found = _over_tiles(fuse, tile_rows, block.kernel.shape[0], block.right.shape[0], block.tiles)
    rows = found.per_row
    projections = (rows if outputs_first else found.per_matrix)["projected"]
    return FusedBlock(
        values=rows["values"],
        kernel_sq=rows["kernel_sq"],
        max_abs=found.per_tile["max_abs"],
        realised={
            name: RealisedSums(
                error_sq=rows[f"error_sq {name}"],
                unchanged=rows[f"unchanged {name}"],
                projected=projections[name],
                q_dot_d=rows.get(f"q_dot_d {name}"),
            )
            for name in dict.fromkeys((dtype, serving_dtype))
        },
        delta_sq=rows.get("delta_sq"),
        projected_delta=projections.get("delta"),
    )


def output_squares(
    kernel: Array, left: Array, right: Array, *, tile_rows: int, outputs_first: bool, device: Any
) -> Array:
    """``|kernel + left @ right|^2`` of one block over its inputs, per output, summed in float32.

    Args:
        kernel: As `Block.kernel`.
        left: As `Block.left`.
        right: As `Block.right`.
        tile_rows: The rows of a tile.
        outputs_first: Whether the kernel is outputs by inputs.
        device: The JAX device to compute on.

    Returns:
        (B, N), or (B * M) if outputs first.
    """
    arrays = jax.device_put((_as_bits(kernel), left, right), device)
    return np.asarray(_output_squares(tile_rows, outputs_first, kernel.dtype.name, *arrays))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _output_squares(tile_rows: int, outputs_first: bool, source: str, kernel: Any, left: Any, right: Any) -> Any:
    def square(tile: Tile) -> TileResult:
        delta = jnp.dot(tile.rows(left), tile.matrix(right), precision=_HIGHEST)
        squares = jnp.square(_widened(tile.rows(kernel), source) + delta).sum(axis=1 if outputs_first else 0)
        return TileResult({"squares": squares}, {}, {}) if outputs_first else TileResult({}, {}, {"squares": squares})

    rows = kernel.shape[0]
    found = _over_tiles(square, tile_rows, rows, right.shape[0], rows // tile_rows)
    return (found.per_row if outputs_first else found.per_matrix)["squares"]


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


def _over_tiles(compute: Callable[[Tile], TileResult], height: int, rows: int, matrices: int, tiles: Any) -> TileResult:
    """Compute so many tiles one after the other; a loop of the device's own, so that its length is no part of the program."""
    count = rows // height
    per_matrix = max(1, count // matrices)
    shapes = jax.eval_shape(lambda: compute(Tile(0, height, 0)))

    def zeros(leading: int, like: Any, axes: int) -> Any:
        return jax.tree.map(lambda one: jnp.zeros((leading, *one.shape[axes:]), one.dtype), like)

    def step(number: Any, seen: TileResult) -> TileResult:
        first, index = number * height, number // per_matrix
        found = compute(Tile(first, height, index))

        def stacked(at: Any) -> Callable[[Any, Any], Any]:
            return lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, at, 0)

        return TileResult(
            jax.tree.map(stacked(first), seen.per_row, found.per_row),
            jax.tree.map(lambda whole, part: stacked(number)(whole, part[None]), seen.per_tile, found.per_tile),
            jax.tree.map(lambda whole, part: whole.at[index].add(part), seen.per_matrix, found.per_matrix),
        )

    start = TileResult(
        zeros(rows, shapes.per_row, 1), zeros(count, shapes.per_tile, 0), zeros(matrices, shapes.per_matrix, 0)
    )
    result: TileResult = jax.lax.fori_loop(0, tiles, step, start)
    return result


def _as_bits(values: Array | None) -> Array | None:
    """Values of a narrow dtype as integers of its width."""
    return values if values is None or values.dtype.itemsize >= 4 else values.view(f"u{values.dtype.itemsize}")


def _widened(bits: Any, dtype: str) -> Any:
    """What `_as_bits` made of values, as float32."""
    stored = dtype_named(dtype)
    return (bits if stored.itemsize >= 4 else jax.lax.bitcast_convert_type(bits, stored)).astype(jnp.float32)


def _narrowed(values: Any, dtype: str) -> Any:
    """float32 values that lie on the grid of a dtype, as what `_as_bits` makes of that dtype."""
    stored = dtype_named(dtype)
    if stored.itemsize >= 4:
        return values.astype(stored)
    return jax.lax.bitcast_convert_type(values.astype(stored), jnp.dtype(f"u{stored.itemsize}"))


def _rounded(values: Any, dtype: str) -> Any:
    """float32 values on the grid of a dtype."""
    if dtype == "bfloat16":
        # XLA may drop a cast to bfloat16 and back as excess precision; it never drops this.
        return jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
    return values.astype(dtype_named(dtype)).astype(jnp.float32)
