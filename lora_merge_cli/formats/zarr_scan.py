"""Reading a zarr array from its first row to its last in bounded memory, however large its chunks are.

A chunk is one Zstandard frame (RFC 8878), which can be decoded piece by piece and only from its start. Its entries are in C order,
so that a row-major walk through the array takes those of each chunk in their own order: chunks that lie side by side are decoded
side by side, each as far as the walk has come.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, cast

import numpy as np
import zstandard

from lora_merge_cli.errors import CorruptCheckpoint
from lora_merge_cli.formats.flat import FlatFile
from lora_merge_cli.formats.zarr_array import ZarrArray
from lora_merge_cli.records import Array, Region, full_region, grid, region_shape, relative

_STORED_PIECE = 256 * 2**10
_DECODED_PIECE = 256 * 2**10
# What the strongest level asks for; a decoder allocates as much as the frame says.
_MAX_WINDOW = 128 * 2**20
_MAX_FRAME_HEADER = 18
_BLOCK_HEADER = 3
_RUN_LENGTH_BLOCK = 1
_CHECKSUM = 4


class StoredValue(Protocol):
    """Where a stored value lies."""

    @property
    def size(self) -> int:
        """Its length in bytes."""

    @property
    def inline(self) -> bytes | None:
        """The bytes themselves; None where a file holds them."""

    @property
    def file(self) -> Path | None:
        """The file that holds them; None where they are inline."""

    @property
    def offset(self) -> int:
        """Where they begin in the file, in bytes."""


def scan(
    array: ZarrArray,
    values: Callable[[str], StoredValue],
    regions: Iterable[Region],
    open_file: Callable[[Path], FlatFile],
    pool: Executor | None = None,
) -> Iterator[Array]:
    """Read regions of an array in row-major order, in one pass through its chunks.

    Memory: the region, and for each chunk that the walk is in the middle of, its decoder's window (RFC 8878, 3.1.1.1.2; 512 KiB at
    level 1) and two pieces of 256 KiB. A chunk that no region touches is not looked up.

    Args:
        array: The array's metadata.
        values: Where the chunk of that name inside the array lies.
        regions: Disjoint and ascending in row-major order. What lies between them is skipped.
        open_file: The opened file at a path.
        pool: Threads that decode several chunks at once; not those that the scan itself runs in.

    Returns:
        One new C-contiguous array per region.

    Raises:
        CorruptCheckpoint: A stored value cannot be read, or is not the chunk that the metadata promise. It is raised where the walk
            meets the damage, and with the chunk's last entry at the latest; `where` is the file.
        ValueError: The regions do not ascend.
    """
    return _Scan(array, values, open_file, pool).read(regions)


class _Scan:
    """A walk through an array, and the chunks that it is in the middle of."""

    def __init__(
        self,
        array: ZarrArray,
        values: Callable[[str], StoredValue],
        open_file: Callable[[Path], FlatFile],
        pool: Executor | None,
    ) -> None:
        self._array = array
        self._values = values
        self._open_file = open_file
        self._pool = pool
        # An array without axes is walked as one of a single entry.
        self._shape = array.shape or (1,)
        self._chunks = array.chunks or (1,)
        self._open: dict[tuple[int, ...], _Chunk] = {}

    def read(self, regions: Iterable[Region]) -> Iterator[Array]:
        for region in regions:
            walked = region or (slice(0, 1),)
            result = np.empty(region_shape(walked), self._array.dtype)
            if result.size:
                self._close_before(walked)
                self._fill(result, walked)
            yield result.reshape(region_shape(region))
            # The next result is made when this one is no longer held here.
            del result

    def _fill(self, result: Array, region: Region) -> None:
        indices = list(
            itertools.product(
                *(
                    range(part.start // chunk, (part.stop - 1) // chunk + 1)
                    for part, chunk in zip(region, self._chunks, strict=True)
                )
            )
        )
        for index in indices:
            if index not in self._open:
                self._open[index] = self._chunk(index)
        chunks = [self._open[index] for index in indices]
        if self._pool is None or len(chunks) == 1:
            for chunk in chunks:
                chunk.read(region, result)
        else:
            tasks = [self._pool.submit(chunk.read, region, result) for chunk in chunks]
            wait(tasks)
            for task in tasks:
                task.result()

    def _chunk(self, index: tuple[int, ...]) -> _Chunk:
        held = tuple(
            slice(i * chunk, min((i + 1) * chunk, extent))
            for i, chunk, extent in zip(index, self._chunks, self._shape, strict=True)
        )
        name = self._array.name(index if self._array.shape else ())
        return _Chunk(self._array, name, self._chunks, held, self._values(name), self._open_file)

    def _close_before(self, region: Region) -> None:
        first = tuple(part.start for part in region)
        passed = [index for index, chunk in self._open.items() if chunk.last < first]
        for index in passed:
            del self._open[index]


class _Chunk:
    """One chunk on the way from its first entry to its last."""

    def __init__(
        self,
        array: ZarrArray,
        name: str,
        shape: tuple[int, ...],
        held: Region,
        value: StoredValue,
        open_file: Callable[[Path], FlatFile],
    ) -> None:
        self.last = tuple(part.stop - 1 for part in held)
        self._array = array
        self._name = name
        self._shape = shape
        self._held = held
        self._value = value
        self._open_file = open_file
        self._entries: _Entries | None = None

    def read(self, region: Region, result: Array) -> None:
        """Bring the part of a region that lies in this chunk to its place in the region's array."""
        entries = self._entries = self._entries or self._opened()
        itemsize = self._array.dtype.itemsize
        wanted = tuple(
            slice(max(part.start, held.start), min(part.stop, held.stop))
            for part, held in zip(region, self._held, strict=True)
        )
        inside = relative(wanted, tuple(slice(held.start, held.start) for held in self._held))
        target = result[relative(wanted, tuple(slice(part.start, part.start) for part in region))]
        strides = [math.prod(self._shape[axis + 1 :]) for axis in range(len(self._shape))]
        for piece in self._pieces(inside):
            position = sum(part.start * stride for part, stride in zip(piece, strides, strict=True)) * itemsize
            valid = tuple(
                slice(part.start, min(part.stop, all_.stop)) for part, all_ in zip(piece, inside, strict=True)
            )
            place = target[relative(valid, tuple(slice(part.start, part.start) for part in inside))]
            if valid == piece and place.flags.c_contiguous:
                entries.read_into(position, place.reshape(-1).view(np.uint8).data)
            else:
                scratch = np.empty(region_shape(piece), self._array.dtype)
                entries.read_into(position, scratch.reshape(-1).view(np.uint8).data)
                place[...] = scratch[tuple(slice(0, extent) for extent in place.shape)]
        if self.last == tuple(part.stop - 1 for part in wanted):
            entries.finish()
            # A region may hold many chunks: none keeps its decoder until the last one is read.
            self._entries = None

    def _pieces(self, inside: Region) -> Iterator[Region]:
        """Cut a part of the chunk into pieces that are contiguous in it, padding behind the part's rows included.

        A row's padding is decoded with it rather than passed over row by row.
        """
        held = region_shape(self._held)
        limit = _DECODED_PIECE // self._array.dtype.itemsize
        axis = 0
        while math.prod(self._shape[axis + 1 :]) > limit or region_shape(inside)[axis + 1 :] != held[axis + 1 :]:
            axis += 1
        row = self._shape[axis + 1 :]
        block = (*(1 for _ in range(axis)), max(1, limit // math.prod(row)), *row)
        return grid((*inside[: axis + 1], *full_region(row)), block)

    def _opened(self) -> _Entries:
        source = _Source(self._value, self._name, self._open_file)
        opened = _RawEntries if self._array.codec == "raw" else _ZstdEntries
        return opened(source, self._array.chunk_bytes)


@dataclass(frozen=True)
class _Source:
    """The bytes of one stored value."""

    value: StoredValue
    name: str
    open_file: Callable[[Path], FlatFile]

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `start` on; the value holds as many."""
        if self.value.file is None:
            buffer[:] = memoryview(self.value.inline or b"")[start : start + len(buffer)]
        else:
            self.open_file(self.value.file).read_into(self.value.offset + start, buffer)

    def corrupt(self, what: str, *, expected: object = None, found: object = None) -> CorruptCheckpoint:
        """The error for what is wrong with the value."""
        return CorruptCheckpoint(f"chunk {self.name} {what}", where=self.value.file, expected=expected, found=found)


class _Entries(Protocol):
    """The decoded bytes of a chunk, from the first to the last."""

    def read_into(self, position: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `position` on, which is nowhere before the last ones that were read."""

    def finish(self) -> None:
        """Make sure that the rest of the value is as it should be."""


class _RawEntries:
    def __init__(self, source: _Source, size: int) -> None:
        if source.value.size != size:
            raise source.corrupt("has the wrong length", expected=f"{size} bytes", found=source.value.size)
        self._source = source

    def read_into(self, position: int, buffer: memoryview) -> None:
        self._source.read_into(position, buffer)

    def finish(self) -> None:
        """Nothing is left to see: the length is all that plain bytes can get wrong."""


class _ZstdEntries:
    def __init__(self, source: _Source, size: int) -> None:
        frame = _Frame(source, size)
        self._source = source
        self._size = size
        self._at = 0
        self._decoder = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).stream_reader(
            cast("IO[bytes]", frame), read_size=_STORED_PIECE
        )

    def read_into(self, position: int, buffer: memoryview) -> None:
        if position < self._at:
            raise ValueError("the regions of a scan must ascend")
        self._skip_to(position)
        self._fill(buffer)

    def finish(self) -> None:
        self._skip_to(self._size)
        # The decoder looks at what follows the last entry, the checksum, only when it is asked for more.
        if self._decode(memoryview(bytearray(1))):
            raise self._source.corrupt("is longer than a chunk", expected=f"{self._size} bytes")

    def _skip_to(self, position: int) -> None:
        if position > self._at:
            scratch = memoryview(bytearray(min(position - self._at, _DECODED_PIECE)))
            while self._at < position:
                self._fill(scratch[: position - self._at])

    def _fill(self, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = self._decode(buffer[done:])
            if not count:
                raise self._source.corrupt(
                    "is shorter than a chunk", expected=f"{self._size} bytes", found=self._at + done
                )
            done += count
        self._at += done

    def _decode(self, buffer: memoryview) -> int:
        try:
            return self._decoder.readinto(buffer)
        except zstandard.ZstdError as error:
            raise self._source.corrupt("cannot be decoded", found=error) from error


class _Frame:
    """A stored value that is one Zstandard frame, as a file for the decoder.

    Follows the blocks (RFC 8878, 3.1.1.2): the decoder does not tell the end of a frame from the end of its input, nor a second
    frame from the first.
    """

    def __init__(self, source: _Source, size: int) -> None:
        self._source = source
        head = bytearray(min(_MAX_FRAME_HEADER, source.value.size))
        source.read_into(0, memoryview(head))
        if not head.startswith(zstandard.FRAME_HEADER):
            raise source.corrupt("is no zstd frame")
        try:
            parameters = zstandard.get_frame_parameters(bytes(head))
            self._block = zstandard.frame_header_size(bytes(head))
        except zstandard.ZstdError as error:
            raise source.corrupt("cannot be decoded", found=error) from error
        if parameters.content_size not in (size, zstandard.CONTENTSIZE_UNKNOWN):
            raise source.corrupt("has the wrong length", expected=f"{size} bytes", found=parameters.content_size)
        self._trailer = _CHECKSUM if parameters.has_checksum else 0
        self._at = 0
        self._end: int | None = None
        self._buffer = memoryview(bytearray(min(_STORED_PIECE, source.value.size)))

    def read(self, size: int) -> memoryview:
        """The next piece of at most `size` bytes, empty behind the frame's end; good until the next one is asked for."""
        piece = self._buffer[: min(size, self._source.value.size - self._at)]
        self._source.read_into(self._at, piece)
        piece = piece[: self._follow_blocks(piece)]
        if not piece and self._at != self._end:
            raise self._source.corrupt("is truncated", found=f"{self._source.value.size} bytes")
        self._at += len(piece)
        return piece

    def _follow_blocks(self, piece: memoryview) -> int:
        """How much of the piece to hand out: a block's header that it holds in part is left to the next one."""
        stop = self._at + len(piece)
        while self._end is None and self._block < stop:
            if self._block + _BLOCK_HEADER > stop:
                return self._block - self._at
            header = int.from_bytes(piece[self._block - self._at :][:_BLOCK_HEADER], "little")
            last, kind, length = header & 1, header >> 1 & 3, header >> 3
            self._block += _BLOCK_HEADER + (1 if kind == _RUN_LENGTH_BLOCK else length)
            if last:
                self._end = self._block + self._trailer
                if self._end < self._source.value.size:
                    raise self._source.corrupt(
                        "holds more than one zstd frame", expected=f"{self._end} bytes", found=self._source.value.size
                    )
        return len(piece)
