"""Kernels changed row by row on the device: the float32 arithmetic of operations by row, and of contributions between them.

Rows are computed in tiles of a height that the number of inputs alone gives, and a row's place in its tile is its number modulo
that height, with zeros where a tile has no rows: XLA's products choose their order of summing by shape and place.

Law: a row's result depends on that row, its number, the operands and the dtype alone, to the bit, whatever rows it is computed
with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_merge_cli.dtypes import FLOAT32
from lora_merge_cli.operations.cutting import TILE_ENTRIES
from lora_merge_cli.operations.interface import Contribution, RowOperands, RowOperation
from lora_merge_cli.records import Array, Setting
from lora_merge_cli.tiles import as_bits, widened

_HIGHEST = jax.lax.Precision.HIGHEST
_LEAST, _MOST = 16, 256

Tile = Callable[[Mapping[str, Array], int], Any]
"""From what a tile's rows have, and the number of its first row, to its result on the device."""


def tile_height(inputs: int) -> int:
    """How many rows with so many inputs are computed at a time: a power of two."""
    fitting = max(1, TILE_ENTRIES // max(1, inputs))
    return min(_MOST, max(_LEAST, 1 << (fitting.bit_length() - 1)))


def row_change(
    operation: RowOperation,
    settings: Mapping[str, Setting],
    kernel: Array,
    operands: RowOperands,
    first: int,
    weight: float,
    device: Any,
) -> Array:
    """What an operation adds to some rows of a kernel.

    Args:
        operation: The operation.
        settings: The site's.
        kernel: Those rows of the unmerged kernel, rows by inputs, of any floating dtype.
        operands: What the operation made of the adapter's leaves; of all rows.
        first: The number of the first of the rows.
        weight: What the change is multiplied by, besides the site's own scale.
        device: The JAX device to compute on.

    Returns:
        ``weight * change``, rows by inputs, float32.
    """
    last = first + len(kernel)
    per_row = {name: values[first:last] for name, values in operands.per_row.items()}
    shared = jax.device_put(dict(operands.shared), device)
    key = tuple(sorted(settings.items()))
    kernel = kernel.astype(FLOAT32) if kernel.dtype.itemsize > FLOAT32.itemsize else kernel

    def change(tile: Mapping[str, Array], number: int) -> Any:
        own = {name: tile[f"operand {name}"] for name in per_row}
        arguments = (tile["kernel"], own, np.int32(number), np.float32(weight))
        rows, own_rows, place, times = jax.device_put(arguments, device)
        return _change(operation, key, kernel.dtype.name, rows, own_rows, shared, place, times)

    rows = {"kernel": as_bits(kernel)} | {f"operand {name}": values for name, values in per_row.items()}
    return _in_tiles(change, rows, kernel.shape, first)


def apply_contribution(x: Array, contribution: Contribution, first: int, device: Any) -> Array:
    """``(1 + gain) * x + (a @ b)^T`` for some rows: what a low-rank operation makes of them.

    Args:
        x: The rows, outputs by inputs, float32.
        contribution: Of the whole kernel, without batch dims.
        first: The number of the first of the rows.
        device: The JAX device to compute on.

    Returns:
        Rows by inputs, float32.
    """
    last = first + len(x)
    rank = contribution.a.shape[-1]
    right = jax.device_put(np.ascontiguousarray(contribution.a.reshape(-1, rank).T), device)
    rows = {"x": x, "left": contribution.b.reshape(rank, -1)[:, first:last].T}
    if contribution.gain is not None:
        rows["factor"] = (1.0 + contribution.gain.reshape(-1)[first:last]).astype(FLOAT32)

    def apply(tile: Mapping[str, Array], _: int) -> Any:
        there = jax.device_put(dict(tile), device)
        return _contributed(there["x"], there["left"], right, there.get("factor"))

    return _in_tiles(apply, rows, x.shape, first)


def _in_tiles(compute: Tile, rows: Mapping[str, Array], shape: tuple[int, ...], first: int) -> Array:
    """Compute what a tile makes of its rows, tile by tile.

    Args:
        compute: What it makes of them.
        rows: By name, what has an entry or a row for each of them.
        shape: Of the result.
        first: The number of the first of them.
    """
    count, inputs = shape
    height = tile_height(inputs)
    before = first % height
    computed = []
    for start in range(-before, count, height):
        inside = slice(max(start, 0), min(start + height, count))
        tile = {name: _padded(values[inside], inside.start - start, height) for name, values in rows.items()}
        # Calls return before the device is done, so that it has the next tile while this one is computed.
        computed.append((inside, start, compute(tile, first + start)))
    result = np.empty((count, inputs), FLOAT32)
    for inside, start, values in computed:
        result[inside] = np.asarray(values)[inside.start - start : inside.stop - start]
    return result


def _padded(values: Array, before: int, height: int) -> Array:
    """So many rows, zeros before and behind those that there are."""
    if len(values) == height:
        return np.ascontiguousarray(values)
    result = np.zeros((height, *values.shape[1:]), values.dtype)
    result[before : before + len(values)] = values
    return result


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _change(
    operation: RowOperation,
    settings: tuple[tuple[str, Setting], ...],
    dtype: str,
    kernel: Any,
    per_row: Any,
    shared: Any,
    first: Any,
    weight: Any,
) -> Any:
    return weight * operation.change(dict(settings), widened(kernel, dtype), per_row, shared, first)


@jax.jit
def _contributed(x: Any, left: Any, right: Any, factor: Any) -> Any:
    added = jnp.dot(left, right, precision=_HIGHEST)
    return (x if factor is None else factor[:, None] * x) + added
