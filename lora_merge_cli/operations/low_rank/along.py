"""Scaling a factor along some of its dims."""

from __future__ import annotations

import numpy as np

from lora_merge_cli.records import Array


def scaled_along(values: Array, dims: str, along: str, by: Array) -> Array:
    """A factor, multiplied by what is given per index of some of its dims; float64.

    Args:
        values: The factor.
        dims: Its dims.
        along: Those that `by` has, in the order in which the factor has them.
        by: Of as many entries as these dims have together, in row-major order.
    """
    shape = [extent if dim in along else 1 for dim, extent in zip(dims, values.shape, strict=True)]
    return np.asarray(values.astype(np.float64) * by.astype(np.float64).reshape(shape))
