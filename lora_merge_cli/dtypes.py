"""Names of dtypes, for flags, metadata and reports."""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np

_EXTENDED = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in (
        "bfloat16",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e4m3b11fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
    )
    # The oldest ml_dtypes lack the last one.
    if hasattr(ml_dtypes, name)
}

BFLOAT16 = _EXTENDED["bfloat16"]
FLOAT32 = np.dtype(np.float32)
FLOAT16 = np.dtype(np.float16)


def dtype_named(name: str) -> np.dtype[Any]:
    """The dtype of that name, ``bfloat16`` and the float8 kinds included.

    Raises:
        TypeError: No dtype has that name.
    """
    return _EXTENDED.get(name) or np.dtype(name)


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether the dtype is a floating-point one, ml_dtypes' included."""
    return np.issubdtype(dtype, np.floating) or dtype in _EXTENDED.values()


def is_float8(dtype: np.dtype[Any]) -> bool:
    """Whether the dtype is one of the eight-bit floating-point ones."""
    return dtype.itemsize == 1 and is_float(dtype)


def fits_float32(dtype: np.dtype[Any]) -> bool:
    """Whether the dtype is a floating-point one whose values float32 has."""
    return is_float(dtype) and dtype.itemsize <= FLOAT32.itemsize


def mantissa_bits(dtype: np.dtype[Any]) -> int:
    """How many bits of the mantissa the floating-point dtype stores."""
    return int(_finfo(dtype).nmant)


def ulp(
    values: np.ndarray[Any, np.dtype[np.float64]],
    dtype: np.dtype[Any],
    *,
    out: np.ndarray[Any, np.dtype[np.float64]] | None = None,
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The distance between representable values of a floating-point dtype around each of the values, all float64.

    Args:
        values: Of any shape.
        dtype: Whose values are counted.
        out: Where to put it: contiguous, of the shape of `values`, and none of their memory.
    """
    exponent_bits = np.uint64(0x7FF0_0000_0000_0000)
    bits = np.ascontiguousarray(values).view(np.uint64)
    found = np.bitwise_and(bits, exponent_bits, out=None if out is None else out.view(np.uint64)).view(np.float64)
    found *= 2.0 ** -mantissa_bits(dtype)
    return np.maximum(found, float(_finfo(dtype).smallest_subnormal), out=found)


def holds_all_values_of(wide: np.dtype[Any], narrow: np.dtype[Any]) -> bool:
    """Whether each value of a dtype is also one of another dtype of the same kind: both floating-point, or both integers."""
    if not (is_float(wide) and is_float(narrow)):
        return wide == narrow or (wide.kind in "iu" and narrow.kind in "iu" and np.can_cast(narrow, wide, "safe"))
    w, n = _finfo(wide), _finfo(narrow)
    return bool(w.nmant >= n.nmant and w.maxexp >= n.maxexp and w.minexp <= n.minexp)


@functools.cache
def _finfo(dtype: np.dtype[Any]) -> Any:
    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
