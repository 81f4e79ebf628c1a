"""Read several leaves of one shape side by side, in little memory whatever they are stored in."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import TypeAlias

import numpy as np

from lora_merge_cli.ahead import Ahead
from lora_merge_cli.formats.interface import Source
from lora_merge_cli.records import Array, Region, TensorSpec, full_region, grid, region_shape, slab

BLOCK_ENTRIES = 2**21
_PIECE_ENTRIES = 2**18

Leaf: TypeAlias = tuple[Source, TensorSpec]
"""A leaf, and where to read it."""


def side_by_side(
    leaves: Sequence[Leaf], rows: Sequence[int] | None = None, pool: Executor | None = None
) -> Iterator[tuple[Region, tuple[Array, ...]]]:
    """Runs of entries of all leaves, from the first to the last, each leaf read ahead on a thread of its own.

    Args:
        leaves: Leaves of one shape, in the order in which the values come.
        rows: The indices of the first axis that are wanted; all of them if None.
        pool: Where parts of a leaf may be decoded at the same time.

    Raises:
        CorruptCheckpoint: A leaf cannot be read.
    """
    regions = list(_regions(leaves[0][1].shape, rows))
    with contextlib.ExitStack() as held:
        # Closed in any case: a thread that reads on would outlive its reader.
        scans = [held.enter_context(Ahead(source.scan(spec.path, regions, pool))) for source, spec in leaves]
        yield from zip(regions, zip(*scans, strict=True), strict=True)


def _regions(shape: tuple[int, ...], rows: Sequence[int] | None) -> Iterator[Region]:
    if rows is None:
        yield from grid(full_region(shape), slab(shape, BLOCK_ENTRIES))
        return
    inner = slab(shape[1:], BLOCK_ENTRIES)
    for row in sorted(rows):
        yield from grid((slice(row, row + 1), *full_region(shape[1:])), (1, *inner))


def flat_pieces(*blocks: Array) -> Iterator[tuple[Array, ...]]:
    """Cut blocks of one shape into runs of entries that fit a cache, side by side."""
    flat = [block.reshape(-1) for block in blocks]
    for start in range(0, flat[0].size, _PIECE_ENTRIES):
        yield tuple(values[start : start + _PIECE_ENTRIES] for values in flat)


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
