"""Comparisons of values, bit for bit."""

from __future__ import annotations

import numpy as np

from lora_merge_cli.records import Array


def equals_rounded(values: Array, reference: Array) -> bool:
    """Whether `values` are `reference`, rounded to their dtype, bit for bit: NaN equals the same NaN, 0 is not -0."""
    with np.errstate(over="ignore"):
        rounded = reference.astype(values.dtype)
    return bool(np.array_equal(_bytes(rounded), _bytes(values)))


def _bytes(values: Array) -> Array:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
