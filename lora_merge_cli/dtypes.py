"""Names of dtypes, for flags, metadata and reports."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

_EXTENDED = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2", "float8_e5m2fnuz")
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
