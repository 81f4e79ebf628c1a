"""Tensors that lie in a file as their plain bytes, row-major and little-endian: safetensors, and torch's archives.

Read with ``pread`` and never mapped: mapped pages would count as resident memory, up to the size of the file.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_merge_cli.errors import CorruptCheckpoint
from lora_merge_cli.formats.interface import LeafData, Stored
from lora_merge_cli.records import Array, Region, region_shape

_PIECE_BYTES = 4 * 2**20


class FlatFile:
    """A file opened for reading at any offset, by any thread.

    Raises:
        CorruptCheckpoint: It is a pipe, a device or a directory.
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Without O_NONBLOCK, opening a pipe would wait for its writer.
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CorruptCheckpoint("not a regular file", where=path)
        self.size = status.st_size

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            close(descriptor)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer of bytes from `offset` on.

        Raises:
            CorruptCheckpoint: The file ends before the buffer is full, or cannot be read.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise CorruptCheckpoint("cannot be read", where=self.path, found=error) from error
            if count == 0:
                raise CorruptCheckpoint(
                    "the file ends too soon",
                    where=self.path,
                    expected=f"{offset + len(buffer)} bytes",
                    found=f"{offset + done}",
                )
            done += count

    def read_bytes(self, offset: int, size: int) -> bytes:
        """So many bytes from `offset` on; see `read_into`."""
        if size > max(0, self.size - offset):
            raise CorruptCheckpoint(
                "the file ends too soon", where=self.path, expected=f"{offset + size} bytes", found=f"{self.size}"
            )
        buffer = bytearray(size)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_region(self, offset: int, shape: Sequence[int], dtype: np.dtype[Any], region: Region) -> Array:
        """A region of a tensor whose bytes begin at `offset`; see `read_into`."""
        result = np.empty(region_shape(region), dtype)
        if result.size:
            raw = result.reshape(-1).view(np.uint8)
            for start, skipped, size in runs(shape, region, dtype.itemsize):
                self.read_into(offset + skipped, raw[start : start + size].data)
        return result

    def pieces(self, offset: int, size: int) -> Iterator[tuple[str, memoryview]]:
        """The bytes from `offset` on, piece by piece; each piece is good until the next one is asked for."""
        buffer = np.empty(min(size, _PIECE_BYTES), np.uint8).data
        for start in range(0, size, _PIECE_BYTES):
            piece = buffer[: min(_PIECE_BYTES, size - start)]
            self.read_into(offset + start, piece)
            yield str(start), piece


def pieces_of(leaf: LeafData, dtype: np.dtype[Any]) -> Iterator[memoryview]:
    """A leaf's bytes from the first to the last.

    Raises:
        CorruptCheckpoint: Its values are of another dtype.
    """
    if isinstance(leaf.data, Stored):
        yield from (memoryview(value).cast("B") for _, value in leaf.data.values)
        return
    for _, values in leaf.data:
        if values.dtype != dtype:
            raise CorruptCheckpoint("values of another dtype", where=leaf.spec.name, expected=dtype, found=values.dtype)
        yield np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def runs(shape: Sequence[int], region: Region, itemsize: int) -> Iterator[tuple[int, int, int]]:
    """The contiguous runs of a region: where each begins in the result and in the tensor, and its size, in bytes."""
    whole = len(shape)
    while whole and (region[whole - 1].start, region[whole - 1].stop) == (0, shape[whole - 1]):
        whole -= 1
    # The last axis that is cut joins the whole ones behind it in one run.
    head = region[: max(whole - 1, 0)]
    tail = math.prod(shape[whole:])
    cut = region[whole - 1] if whole else slice(0, 1)
    size = (cut.stop - cut.start) * tail * itemsize
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    for number, index in enumerate(np.ndindex(*region_shape(head))):
        first = sum((part.start + i) * stride for part, i, stride in zip(head, index, strides, strict=False))
        first += cut.start * tail if whole else 0
        yield number * size, first * itemsize, size
