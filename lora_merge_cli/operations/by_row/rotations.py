"""Rotations of blocks of the inputs, as OFT and BOFT make them of skew-symmetric matrices.

All are given less the identity, ``R - I``: a rotation is near the identity, and what it changes is small beside what it keeps.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lora_merge_cli.errors import NonFiniteInput
from lora_merge_cli.operations.by_row.arithmetic import product
from lora_merge_cli.records import AdapterSite, Array

_ROTATES = 1e-6
"""How far from orthogonal a rotation may be."""


def skew_from_upper(upper: Array, size: int) -> Array:
    """Skew-symmetric matrices from what is above their diagonals, row by row; float64.

    Args:
        upper: (blocks, size * (size - 1) / 2).
        size: Rows of one.
    """
    result = np.zeros((len(upper), size, size))
    rows, columns = np.triu_indices(size, 1)
    result[:, rows, columns] = upper
    return result - np.swapaxes(result, -1, -2)


def cayley(site: AdapterSite, skew: Array) -> Array:
    """``(I - Q) (I + Q)^-1 - I``, which is ``-2 Q (I + Q)^-1``, of each matrix; float64.

    Args:
        site: Whose they are.
        skew: (..., b, b).

    Raises:
        NonFiniteInput: ``I + Q`` cannot be inverted in float64, or is not finite.
    """
    sum_with_one = np.eye(skew.shape[-1]) + skew
    try:
        # X (I + Q) = -2 Q, transposed.
        solved = np.linalg.solve(np.swapaxes(sum_with_one, -1, -2), np.swapaxes(-2 * skew, -1, -2))
    except np.linalg.LinAlgError:
        solved = np.full_like(skew, np.nan)
    # (X + I) (X + I)^T - I, which is zero of a rotation; rounding has drowned the I of an I + Q whose Q is huge and of odd size.
    excess = solved + np.swapaxes(solved, -1, -2) + solved @ np.swapaxes(solved, -1, -2)
    singular = int(np.sum(~(np.abs(excess).max(axis=(-1, -2), initial=0.0) < _ROTATES)))
    if singular:
        raise NonFiniteInput(
            "a rotation's matrix I + Q is singular in float64",
            where=site.name,
            found=f"{singular} of {math.prod(skew.shape[:-2])} blocks",
        )
    return np.asarray(np.swapaxes(solved, -1, -2))


def change_of_rotation(kernel: Any, less_one: Any) -> Any:
    """``W (R - I)^T`` block by block, R standing for the block-diagonal matrix of all blocks; traced, float32.

    Args:
        kernel: W, rows by inputs.
        less_one: ``R - I``, (blocks, b, b); of one block, shared by all.
    """
    rows, inputs = kernel.shape
    count, size, _ = less_one.shape
    blocks = kernel.reshape(rows, inputs // size, size)
    if count == 1:
        return product("nbk,ck->nbc", blocks, less_one[0]).reshape(rows, inputs)
    return product("nbk,bck->nbc", blocks, less_one).reshape(rows, inputs)
