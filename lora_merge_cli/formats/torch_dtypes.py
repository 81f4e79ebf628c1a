"""The dtypes of torch's files: which numpy dtype each is, and how a storage of it is named."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from lora_merge_cli.dtypes import BFLOAT16, dtype_named

UNTYPED = "UntypedStorage"

STORAGES: dict[str, np.dtype[Any]] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexDoubleStorage": np.dtype(np.complex128),
    "ComplexFloatStorage": np.dtype(np.complex64),
}
"""The classes that name their dtype. Younger dtypes have none: theirs is an `UNTYPED` one beside the dtype."""

DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32),
    "uint16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
    "complex128": np.dtype(np.complex128),
    "complex64": np.dtype(np.complex64),
    "float8_e4m3fn": dtype_named("float8_e4m3fn"),
    "float8_e4m3fnuz": dtype_named("float8_e4m3fnuz"),
    "float8_e5m2": dtype_named("float8_e5m2"),
    "float8_e5m2fnuz": dtype_named("float8_e5m2fnuz"),
}
"""The dtypes by their name in torch, as far as numpy and ml_dtypes have them."""

# ml_dtypes has it from 0.5 on.
if hasattr(ml_dtypes, "float8_e8m0fnu"):
    DTYPES["float8_e8m0fnu"] = np.dtype(ml_dtypes.float8_e8m0fnu)

_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def storage_name(dtype: np.dtype[Any]) -> str | None:
    """The storage class that names this dtype, or None if none does."""
    return _STORAGE_NAMES.get(dtype)


def dtype_name(dtype: np.dtype[Any]) -> str | None:
    """The dtype's name in torch, or None if torch has no such dtype."""
    return _DTYPE_NAMES.get(dtype)
