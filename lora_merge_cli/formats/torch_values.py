"""What a torch pickle may stand for besides Python's own values. Built by `torch_pickle`, from checked numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_merge_cli.errors import CorruptCheckpoint, UnsupportedCheckpoint

_MOST_AXES = 32
_LARGEST = 2**62


class Size(tuple[Any, ...]):
    """A ``torch.Size``."""

    __slots__ = ()


@dataclass(frozen=True)
class Global:
    """A name that the pickle asks for and that the reader knows. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Storage:
    """A run of bytes in the file, not yet located."""

    key: str
    """Its name in the file."""
    dtype: np.dtype[Any]
    """What its entries are, unless the tensor says otherwise."""
    root_nbytes: int
    """The size of everything under that key."""
    start: int
    """Where this storage begins in it, in bytes."""
    nbytes: int
    """Its own size."""


@dataclass(frozen=True)
class TensorView:
    """A tensor: which entries of a storage it shows. Offset and strides count entries."""

    storage: Storage
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def first_byte(self) -> int:
        """Where the first entry lies under the storage's key."""
        return self.storage.start + self.offset * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the entries lie in row-major order without gaps."""
        step = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and stride != step:
                return 0 in self.shape
            step *= extent
        return True


def is_count(value: object) -> bool:
    """Whether the value is an integer from 0 on that any file could hold so many bytes of."""
    return type(value) is int and 0 <= value < _LARGEST


def make_view(
    storage: Storage, dtype: np.dtype[Any], offset: Any, shape: Any, strides: Any, where: object
) -> TensorView:
    """A tensor over a storage.

    Raises:
        CorruptCheckpoint: It would show entries outside the storage, or the numbers make no sense.
        UnsupportedCheckpoint: It shows more entries than there are, as an expanded tensor does.
    """
    if not (isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= _MOST_AXES):
        raise CorruptCheckpoint("a tensor whose shape and strides make no sense", where=where)
    if not (is_count(offset) and all(map(is_count, shape)) and all(map(is_count, strides))):
        raise CorruptCheckpoint(
            "a tensor with a negative or absurd offset, extent or stride", where=where, found=shape_text(shape, strides)
        )
    held = storage.nbytes // dtype.itemsize
    # The entries of an empty tensor are none, but numpy still multiplies its other extents.
    if math.prod(extent or 1 for extent in shape) * dtype.itemsize >= _LARGEST:
        raise CorruptCheckpoint("a tensor of an absurd shape", where=where, found=shape_text(shape, strides))
    entries = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if entries else offset - 1
    if last >= held:
        raise CorruptCheckpoint(
            "a tensor reaches outside its storage",
            where=where,
            expected=f"at most {held} entries",
            found=f"entry {last} of {shape_text(shape, strides)}",
        )
    if entries > held:
        raise UnsupportedCheckpoint(
            "an expanded tensor, which shows the same numbers again and again",
            where=where,
            expected=f"at most the {held} entries that are stored",
            found=shape_text(shape, strides),
            hint="save it with .contiguous()",
        )
    return TensorView(storage, dtype, offset, tuple(shape), tuple(strides))


def shape_text(shape: Sequence[object], strides: Sequence[object]) -> str:
    """A shape and strides for an error; they may hold anything."""
    if not all(type(n) is int and abs(n) <= _LARGEST for n in (*shape, *strides)):
        return "something other than integers"
    return f"shape {tuple(shape)} with strides {tuple(strides)}"
