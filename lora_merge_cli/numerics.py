"""The float32 kernels of a fusion, jitted: what runs on the device, tile by tile."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_merge_cli.dtypes import dtype_named
from lora_merge_cli.records import Array
from lora_merge_cli.rounding import Choice
from lora_merge_cli.rounding_numerics import Neighbours, drawn, neighbours, preserved, stored
from lora_merge_cli.tiles import Tile, TileResult, as_bits, in_turn, narrowed, over_tiles, pytree, rounded, widened

_HIGHEST = jax.lax.Precision.HIGHEST
_NEAREST = "to nearest"


@pytree
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
    inputs: Any = None
    """U, an orthonormal basis of what lora_a's columns span, shaped as `basis`; only to preserve."""
    penalty: Any = None
    """See `rounding.penalty`, (B,), float32; only to preserve."""
    carry: Any = None
    """What `rounding_numerics.preserved` carries from the block before, (rank, N); only to preserve, and not if outputs first."""
    bits: Any = None
    """16 random bits per entry, (B * M, N), uint16; only to round stochastically."""


@pytree
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


@pytree
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
    nearest: RealisedSums | None = None
    """Where there was a choice: what rounding to nearest would have left."""
    moved: Any = None
    """Per row, where a choice was made for a narrower dtype than the stored one: entries that are not the exact result."""


@dataclass(frozen=True)
class StartedBlock:
    """A block on its way: the device may still be computing it."""

    fused: FusedBlock
    """On the device."""
    carry: Any
    """What the next block of the matrix takes, on the device; None where it takes nothing."""
    dtype: str
    """The name of the dtype that is stored."""

    def finish(self) -> FusedBlock:
        """Wait for it, and fetch it."""
        found: FusedBlock = jax.device_get(self.fused)
        return dataclasses.replace(found, values=found.values.view(dtype_named(self.dtype)))


def start_block(
    block: Block,
    *,
    tile_rows: int,
    outputs_first: bool,
    dtype: str,
    serving_dtype: str,
    device: Any,
    choice: Choice | None = None,
) -> StartedBlock:
    """``(1 + gain) * (base or kernel) + left @ right`` in float32, rounded once to `dtype`.

    Args:
        block: NumPy arrays; the carry may be on the device already.
        tile_rows: The rows of a tile.
        outputs_first: Whether the kernel is outputs by inputs.
        dtype: The name of the dtype to round to.
        serving_dtype: The name of the dtype that a server will cast to; survival is measured for both.
        device: The JAX device to compute on.
        choice: Which of two neighbours to take; None for the nearer one.
    """
    sources = tuple(None if values is None else values.dtype.name for values in (block.kernel, block.base))
    base = None if block.base is None else as_bits(block.base)
    sent = jax.device_put(dataclasses.replace(block, kernel=as_bits(block.kernel), base=base), device)
    fused, carry = _fuse(tile_rows, outputs_first, sources, dtype, serving_dtype, choice, sent)
    return StartedBlock(fused, carry, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _fuse(
    tile_rows: int,
    outputs_first: bool,
    sources: tuple[str, str | None],
    dtype: str,
    serving_dtype: str,
    choice: Choice | None,
    block: Block,
) -> tuple[FusedBlock, Any]:
    dtypes = tuple(dict.fromkeys((dtype, serving_dtype)))

    def fuse(tile: Tile, carry: Any) -> tuple[TileResult, Any]:
        kernel = widened(tile.rows(block.kernel), sources[0])
        changed = kernel if sources[1] is None else widened(tile.rows(block.base), sources[1])
        delta = product = jnp.dot(tile.rows(block.left), tile.matrix(block.right), precision=_HIGHEST)
        factor = 1.0
        if block.gain is not None:
            gain = tile.rows(block.gain)[:, None] if outputs_first else tile.matrix(block.gain)[None, :]
            factor = 1 + gain
            delta = gain * changed + product
        result = factor * changed + product

        def projected(values: Any) -> Any:
            if outputs_first:
                return jnp.dot(values, tile.matrix(block.basis), precision=_HIGHEST)
            return jnp.dot(tile.rows(block.basis).T, values, precision=_HIGHEST)

        if choice is None:
            values = rounded(result, dtype)
        else:
            # What the fine-tune ran on is what is to be preserved, also where another base is what it is added to.
            aim = result if choice.method == "stochastic" else factor * kernel + product
            chosen, carry = _chosen(block, tile, aim, choice, outputs_first, carry)
            values = stored(result, chosen, choice, dtype)
        per_unit = 1 / block.unit
        per_row = {"values": narrowed(values, dtype), "kernel_sq": jnp.sum(kernel * kernel, axis=-1)}
        projections = {}

        def measure(name: str, kept: Any, grid: str) -> None:
            q = kept - (kernel if sources[0] == grid else rounded(kernel, grid))
            error = (q - delta) * per_unit
            per_row[f"error_sq {name}"] = jnp.sum(error * error, axis=-1)
            per_row[f"unchanged {name}"] = jnp.sum(q == 0, axis=-1, dtype=jnp.int32)
            projections[name] = projected(q)
            if block.gain is not None:
                per_row[f"q_dot_d {name}"] = jnp.sum((q * per_unit) * (delta * per_unit), axis=-1)

        for name in dtypes:
            # A server casts what is stored, so the stored values are what it rounds once more.
            measure(name, values if name == dtype else rounded(values, name), name)
        if choice is not None:
            measure(_NEAREST, rounded(result, choice.grid), choice.grid)
            if choice.grid != dtype:
                per_row["moved"] = jnp.sum(values != result, axis=-1, dtype=jnp.int32)
        if block.gain is not None:
            per_row["delta_sq"] = jnp.sum(jnp.square(delta * per_unit), axis=-1)
            projections["delta"] = projected(delta)
        return TileResult(
            per_row=per_row | ({"projected": projections} if outputs_first else {}),
            per_tile={"max_abs": jnp.max(jnp.abs(delta))},
            per_matrix={} if outputs_first else {"projected": projections},
        ), carry

    found, carry = in_turn(fuse, block.carry, tile_rows, block.kernel.shape[0], block.right.shape[0], block.tiles)
    rows = found.per_row
    projections = (rows if outputs_first else found.per_matrix)["projected"]

    def sums(name: str) -> RealisedSums:
        return RealisedSums(
            error_sq=rows[f"error_sq {name}"],
            unchanged=rows[f"unchanged {name}"],
            projected=projections[name],
            q_dot_d=rows.get(f"q_dot_d {name}"),
        )

    fused = FusedBlock(
        values=rows["values"],
        kernel_sq=rows["kernel_sq"],
        max_abs=found.per_tile["max_abs"],
        realised={name: sums(name) for name in dtypes},
        delta_sq=rows.get("delta_sq"),
        projected_delta=projections.get("delta"),
        nearest=None if choice is None else sums(_NEAREST),
        moved=rows.get("moved"),
    )
    return fused, carry


def _chosen(block: Block, tile: Tile, aim: Any, choice: Choice, outputs_first: bool, carry: Any) -> tuple[Any, Any]:
    """The neighbours of a tile's values that are chosen, and what is carried on."""
    found = neighbours(aim, choice.grid)
    if choice.method == "stochastic":
        return drawn(aim, found, tile.rows(block.bits)), carry
    penalty = tile.matrix(block.penalty)
    if not outputs_first:
        return preserved(aim, found, tile.rows(block.inputs), penalty, carry)
    turned = Neighbours(found.nearest.T, found.step.T)
    start = jnp.zeros((block.inputs.shape[-1], aim.shape[0]), jnp.float32)
    values, _ = preserved(aim.T, turned, tile.matrix(block.inputs), penalty, start)
    return values.T, carry


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
    arrays = jax.device_put((as_bits(kernel), left, right), device)
    return np.asarray(_output_squares(tile_rows, outputs_first, kernel.dtype.name, *arrays))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _output_squares(tile_rows: int, outputs_first: bool, source: str, kernel: Any, left: Any, right: Any) -> Any:
    def square(tile: Tile) -> TileResult:
        delta = jnp.dot(tile.rows(left), tile.matrix(right), precision=_HIGHEST)
        squares = jnp.square(widened(tile.rows(kernel), source) + delta).sum(axis=1 if outputs_first else 0)
        return TileResult({"squares": squares}, {}, {}) if outputs_first else TileResult({}, {}, {"squares": squares})

    rows = kernel.shape[0]
    found = over_tiles(square, tile_rows, rows, right.shape[0], rows // tile_rows)
    return (found.per_row if outputs_first else found.per_matrix)["squares"]
