"""Encoding a zarr array whose chunks are runs of its entries: its metadata document, and its chunks from a stream of bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import zstandard

from lora_merge_cli.formats.zarr_array import ZarrArray

ZSTD_LEVEL = 1
_ZEROS = bytes(2**20)


def metadata_of(array: ZarrArray, version: int) -> tuple[str, bytes]:
    """The name and the contents of an array's metadata document.

    Raises:
        ValueError: zarr has no such dtype.
    """
    name, document = (".zarray", _version_2(array)) if version == 2 else ("zarr.json", _version_3(array))
    contents = json.dumps(document, separators=(",", ":"), sort_keys=True).encode()
    if ZarrArray.parse(contents, version) != array:
        raise ValueError(f"zarr has no dtype {array.dtype.name}")
    return name, contents


def chunks_of(array: ZarrArray, pieces: Iterable[memoryview]) -> Iterator[tuple[str, Iterable[bytes | memoryview]]]:
    """The name and the stored bytes of each chunk, to be taken in turn.

    Args:
        array: The array. Its chunks are runs of entries: ones, a part of one axis (that divides it unless it is the first), whole
            axes.
        pieces: The bytes of its entries from the first to the last. The last chunk is filled up with zeros.

    Raises:
        ValueError: Its chunks are no runs of entries: bytes would land in the wrong one.
    """
    cut = max((axis for axis, n in enumerate(array.shape) if array.chunks[axis] < n), default=0)
    uneven = cut and math.prod(array.shape[:cut]) > 1 and array.shape[cut] % array.chunks[cut]
    if uneven or any(chunk > 1 for chunk in array.chunks[:cut]):
        raise ValueError(f"chunks of {array.chunks} are no runs of the entries of {array.shape}")
    stream = _Stream(pieces)
    for name in array.names():
        plain = stream.take(array.chunk_bytes)
        yield name, plain if array.codec == "raw" else _compressed(plain, array.chunk_bytes)


class _Stream:
    def __init__(self, pieces: Iterable[memoryview]) -> None:
        self._pieces = iter(pieces)
        self._rest = memoryview(b"")

    def take(self, size: int) -> Iterator[memoryview]:
        """The next so many bytes; zeros behind the last one."""
        while size:
            if not self._rest:
                self._rest = next(self._pieces, memoryview(_ZEROS))
                continue
            piece, self._rest = self._rest[:size], self._rest[size:]
            size -= len(piece)
            yield piece


def _compressed(pieces: Iterable[memoryview], size: int) -> Iterator[bytes]:
    # The content does not depend on how many threads there are, only on whether there is more than the caller's own.
    encoder = zstandard.ZstdCompressor(level=ZSTD_LEVEL, threads=-1).compressobj(size=size)
    for piece in pieces:
        yield encoder.compress(piece)
    yield encoder.flush()


def _version_2(array: ZarrArray) -> dict[str, Any]:
    return {
        "chunks": list(array.chunks),
        "compressor": None if array.codec == "raw" else {"id": "zstd", "level": ZSTD_LEVEL},
        "dimension_separator": array.separator,
        "dtype": array.dtype.str if array.dtype.isbuiltin == 1 else array.dtype.name,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(array.shape),
        "zarr_format": 2,
    }


def _version_3(array: ZarrArray) -> dict[str, Any]:
    codecs: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if array.codec == "zstd":
        codecs.append({"name": "zstd", "configuration": {"level": ZSTD_LEVEL}})
    zero: Any = np.zeros((), array.dtype).astype(object).item() if array.dtype.kind in "biu" else 0.0
    return {
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(array.chunks)}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": codecs,
        "data_type": array.dtype.name,
        "fill_value": [0.0, 0.0] if array.dtype.kind == "c" else zero,
        "node_type": "array",
        "shape": list(array.shape),
        "zarr_format": 3,
    }
