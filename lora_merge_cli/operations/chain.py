"""A kernel being changed by adapters not all of which are low-rank products: row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_merge_cli.dtypes import FLOAT32
from lora_merge_cli.equation import Equation
from lora_merge_cli.operations.cutting import Cut, cut
from lora_merge_cli.operations.interface import Contribution, RowOperands, RowOperation
from lora_merge_cli.operations.row_numerics import apply_contribution, row_change
from lora_merge_cli.records import AdapterSite, Array, Region


@dataclass(frozen=True)
class RowSite:
    """A site whose operation is by row, ready to be computed."""

    operation: RowOperation
    """Its arithmetic."""
    site: AdapterSite
    """The site."""
    operands: RowOperands
    """What that takes besides the kernel."""
    weight: float
    """What its change is multiplied by."""


class Chain:
    """What the sites of one kernel W make of it: ``X + sum of weight * change_k(W)``, X being what the low-rank ones make of W.

    Those follow one another, see `sequence.in_sequence`; what the others change is that of the unmerged kernel, and nothing
    rescales it.

    Law: an entry's result depends on its row of the kernel, the sites and the dtypes alone.

    Args:
        equation: Which dims are inputs and outputs: that of any of its sites.
        shape: The kernel's shape.
        low_rank: What all low-rank sites make of it in their order; None if there are none.
        by_row: The others.
        device: The JAX device to compute on.
    """

    def __init__(
        self,
        equation: Equation,
        shape: Sequence[int],
        low_rank: Contribution | None,
        by_row: Sequence[RowSite],
        device: Any,
    ) -> None:
        self._cut, self._low_rank, self._by_row, self._device = cut(equation, shape), low_rank, by_row, device

    def apply(self, region: Region, kernel: Array) -> Array:
        """What becomes of one block; keeps nothing, so any thread may.

        Args:
            region: Where the block lies: whole outputs where these are the rows, else all of the kernel.
            kernel: The unmerged values there, any float dtype but float64.

        Returns:
            float32, in the block's shape.
        """
        first, rows = self._rows(region, kernel)
        result = rows.astype(FLOAT32)
        if self._low_rank is not None:
            result = apply_contribution(result, self._low_rank, first, self._device)
        for part in self._by_row:
            settings = part.site.settings
            result = result + row_change(
                part.operation, settings, rows, part.operands, first, part.weight, self._device
            )
        return np.ascontiguousarray(result if self._cut.outputs_first else result.T).reshape(kernel.shape)

    def _rows(self, region: Region, kernel: Array) -> tuple[int, Array]:
        """The number of the block's first output, and its values as outputs by inputs."""
        if not self._cut.outputs_first:
            return 0, np.ascontiguousarray(kernel.reshape(self._cut.rows, self._cut.columns).T)
        first, count = self._cut.rows_of(region)
        return first, kernel.reshape(count, -1)


def outputs_and_inputs(equation: Equation, shape: Sequence[int]) -> tuple[int, int]:
    """The shape of a kernel as a matrix of outputs by inputs."""
    found: Cut = cut(equation, shape)
    return (found.rows, found.columns) if found.outputs_first else (found.columns, found.rows)
