"""How a kernel is cut up for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_merge_cli.equation import Equation
from lora_merge_cli.records import Region, even_part, region_shape, slab

TILE_ENTRIES = 2**19
BLOCK_ENTRIES = 2**22


@dataclass(frozen=True)
class Cut:
    """A kernel as a stack of matrices, one behind the other in row-major order, in blocks of whole rows.

    Rows are inputs and columns outputs, or the other way round where the kernel is stored so.
    """

    shape: tuple[int, ...]
    """The kernel's own extents."""
    matrices: int
    """One per index of the batch dims."""
    rows: int
    """Of one matrix."""
    columns: int
    """Of one matrix."""
    row_axes: int
    """How many of the kernel's axes make up its rows, those of the batch included."""
    outputs_first: bool
    """Whether rows are outputs."""
    block: tuple[int, ...]
    """What one call computes, in the kernel's own dims: a run of rows of one matrix, or several whole matrices."""
    tile_rows: int
    """How many rows of a block are computed at a time. Where several matrices are in a block, it divides `rows`."""

    @property
    def block_rows(self) -> int:
        """The rows of a full block, rounded up to whole tiles."""
        rows = math.prod(self.block[: self.row_axes])
        return -(-rows // self.tile_rows) * self.tile_rows

    def rows_of(self, region: Region) -> tuple[int, int]:
        """The first row of a block, counted over all matrices, and how many rows it has."""
        parts = region[: self.row_axes]
        first = 0
        for part, extent in zip(parts, self.shape, strict=False):
            first = first * extent + part.start
        return first, math.prod(region_shape(parts))


def cut(equation: Equation, shape: Sequence[int]) -> Cut:
    """Cut a kernel by its shape and the kind of its sites alone, so that results are the same bits for any number of jobs.

    A tile has some half a million entries, to fit a cache, and a block some four million, to be worth a call.

    Args:
        equation: Which dims are batch, inputs and outputs: that of any of its sites.
        shape: Its extents.

    Raises:
        ValueError: It is no stack of matrices: the batch dims do not lead, or inputs and outputs are mixed.
    """
    outputs_first = bool(equation.inputs and equation.outputs) and equation.target.endswith(equation.inputs)
    over, along = (equation.outputs, equation.inputs) if outputs_first else (equation.inputs, equation.outputs)
    if equation.batch + over + along != equation.target:
        raise ValueError(f"{equation}: the kernel is no stack of matrices")
    batch, row_axes = len(equation.batch), len(equation.batch + over)
    matrices, row_dims = math.prod(shape[:batch]), shape[batch:row_axes]
    rows, columns = math.prod(row_dims), math.prod(shape[row_axes:])
    block = slab(row_dims, max(1, BLOCK_ENTRIES // max(columns, 1)))
    tile_rows = even_part(math.prod(block), max(1, TILE_ENTRIES // max(columns, 1)))
    leading = (1,) * batch
    if math.prod(block) == rows and rows % tile_rows == 0:
        leading = slab(shape[:batch], max(1, BLOCK_ENTRIES // max(rows * columns, 1)))
    return Cut(
        shape=tuple(shape),
        matrices=matrices,
        rows=rows,
        columns=columns,
        row_axes=row_axes,
        outputs_first=outputs_first,
        block=(*leading, *block, *shape[row_axes:]),
        tile_rows=tile_rows,
    )
