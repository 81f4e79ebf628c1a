"""Read several leaves of one shape side by side, each chunk decoded as seldom as the chunk grids allow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from lora_merge_cli.formats.interface import Source
from lora_merge_cli.records import Array, Region, TensorSpec, full_region, region_shape, relative

_BLOCK_BYTES = 32 * 2**20

Leaf: TypeAlias = tuple[Source, TensorSpec]
"""A leaf, and where to read it."""


def side_by_side(
    leaves: Sequence[Leaf], rows: Sequence[int] | None = None
) -> Iterator[tuple[Region, tuple[Array, ...]]]:
    """Blocks of all leaves, region by region.

    The leaf with the largest chunks leads: one window of it, whole chunks, is held while the others are read inside it, so memory
    is one window of each leaf. Small chunks are taken several at a time.

    Args:
        leaves: Leaves of one shape, in the order in which the blocks come.
        rows: The indices of the first axis that are wanted; all of them if None. A single leaf may come with more.

    Raises:
        CorruptCheckpoint: A leaf cannot be read.
    """
    windows = [_window(source.chunk(spec.path), spec) for source, spec in leaves]
    order = sorted(range(len(leaves)), key=lambda i: -math.prod(windows[i]) * leaves[i][1].dtype.itemsize)

    def blocks(depth: int, inside: Region) -> Iterator[tuple[Region, tuple[Array, ...]]]:
        if depth == len(order):
            yield inside, ()
            return
        source, spec = leaves[order[depth]]
        for window in _aligned(inside, windows[order[depth]]):
            wanted = [window] if rows is None else _rows_of(window, rows)
            if not wanted:
                continue
            values = source.read(spec.path, window)
            for region in [window] if depth + 1 == len(order) else wanted:
                for part, others in blocks(depth + 1, region):
                    yield part, (values[relative(part, window)], *others)

    for part, values in blocks(0, full_region(leaves[0][1].shape)):
        yield part, tuple(values[order.index(i)] for i in range(len(order)))


def _rows_of(window: Region, rows: Sequence[int]) -> list[Region]:
    first, *rest = window
    return [(slice(row, row + 1), *rest) for row in rows if first.start <= row < first.stop]


def _window(chunk: Sequence[int], spec: TensorSpec) -> tuple[int, ...]:
    """A chunk, grown from the last axis on to a size worth a read."""
    block = [max(1, min(extent, size)) for extent, size in zip(chunk, spec.shape, strict=True)]
    for axis in reversed(range(len(block))):
        room = max(1, _BLOCK_BYTES // max(1, math.prod(block) * spec.dtype.itemsize))
        block[axis] = min(max(1, spec.shape[axis]), block[axis] * room)
        if block[axis] < spec.shape[axis]:
            break
    return tuple(block)


def _aligned(region: Region, block: Sequence[int]) -> Iterator[Region]:
    """Cut a region along the grid that starts at the leaf's origin, in row-major order."""
    if not region:
        yield ()
        return
    (first, *rest), (extent, *extents) = region, block
    start = first.start
    while start < first.stop:
        stop = min((start // extent + 1) * extent, first.stop)
        for tail in _aligned(tuple(rest), extents):
            yield (slice(start, stop), *tail)
        start = stop


def pieces(region: Region, entries: int = 2**18, columns: int = 512) -> Iterator[Region]:
    """Cut a region into pieces that fit a cache: at most so many columns, and about so many entries.

    Args:
        region: What to cut.
        entries: About how many entries a piece has.
        columns: How many entries of the last axis it has at most, so that it is as high as it is wide.
    """
    extents = region_shape(region)
    block = [*extents[:-1], min(extents[-1], columns)] if extents else []
    for axis, extent in enumerate(block[:-1]):
        excess = -(-math.prod(block) // entries)
        if excess <= 1:
            break
        block[axis] = max(1, extent // excess)
    for corner in np.ndindex(*(-(-n // b) for n, b in zip(extents, block, strict=True))):
        yield tuple(
            slice(part.start + i * b, min(part.start + (i + 1) * b, part.stop))
            for part, i, b in zip(region, corner, block, strict=True)
        )
