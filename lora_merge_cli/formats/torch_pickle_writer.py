"""Writing the pickle of a torch file: instructions that ``torch.load(weights_only=True)`` knows, and no others.

`pickle` itself cannot write them, since it wants to import the classes that it names.
"""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_merge_cli.formats.torch_dtypes import UNTYPED, dtype_name, storage_name
from lora_merge_cli.formats.torch_values import Size

_ORDERED_DICT = ("collections", "OrderedDict")


@dataclass(frozen=True)
class StoredTensor:
    """A contiguous tensor that fills a storage of the archive."""

    key: str
    """The storage's key."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def write_pickle(value: Any) -> bytes:
    """The pickle of a value: what `read_pickle` returns, with a `StoredTensor` for each tensor."""
    return b"".join((pickle.PROTO, b"\x02", _pickled(value), pickle.STOP))


def _pickled(value: Any) -> bytes:
    kind = type(value)
    if kind is StoredTensor:
        return _tensor(value)
    if kind in (dict, OrderedDict):
        empty = pickle.EMPTY_DICT if kind is dict else _call(_ORDERED_DICT, ())
        items = b"".join(_pickled(key) + _pickled(item) for key, item in value.items())
        return empty + pickle.MARK + items + pickle.SETITEMS
    if kind is list:
        return pickle.EMPTY_LIST + pickle.MARK + b"".join(map(_pickled, value)) + pickle.APPENDS
    if kind is Size:
        return _call(("torch", "Size"), (tuple(value),))
    if kind is tuple:
        return pickle.MARK + b"".join(map(_pickled, value)) + pickle.TUPLE if value else pickle.EMPTY_TUPLE
    return _scalar(value)


def _scalar(value: Any) -> bytes:
    if value is None:
        return pickle.NONE
    if isinstance(value, bool):
        return pickle.NEWTRUE if value else pickle.NEWFALSE
    if isinstance(value, str):
        text = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(text)) + text
    if isinstance(value, float):
        return pickle.BINFLOAT + struct.pack(">d", value)
    if -(2**31) <= value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    digits = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(digits)]) + digits


def _tensor(tensor: StoredTensor) -> bytes:
    kind = storage_name(tensor.dtype)
    count = int(np.prod(tensor.shape, dtype=np.int64))
    typed = ("torch", kind) if kind else ("torch.storage", UNTYPED)
    size = count if kind else count * tensor.dtype.itemsize
    storage = b"".join(
        (
            pickle.MARK,
            _scalar("storage"),
            _name(typed),
            _scalar(tensor.key),
            _scalar("cpu"),
            _scalar(size),
            pickle.TUPLE,
            pickle.BINPERSID,
        )
    )
    strides, step = [], 1
    for extent in reversed(tensor.shape):
        strides.append(step)
        step *= max(1, extent)
    dtype = b"" if kind else _name(("torch", str(dtype_name(tensor.dtype))))
    rebuild = _name(("torch._utils", "_rebuild_tensor_v2" if kind else "_rebuild_tensor_v3"))
    layout = _scalar(0) + _pickled(tensor.shape) + _pickled(tuple(reversed(strides)))
    # requires_grad, and hooks for the backward pass: none.
    flags = pickle.NEWFALSE + _call(_ORDERED_DICT, ())
    return b"".join((rebuild, pickle.MARK, storage, layout, flags, dtype, pickle.TUPLE, pickle.REDUCE))


def _call(function: tuple[str, str], arguments: tuple[Any, ...]) -> bytes:
    return _name(function) + _pickled(arguments) + pickle.REDUCE


def _name(function: tuple[str, str]) -> bytes:
    module, name = function
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
