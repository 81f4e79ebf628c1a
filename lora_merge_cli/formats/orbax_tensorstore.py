"""Arrays of an Orbax item that are kept in a way that only TensorStore reads: sharded, compressed otherwise, transposed.

TensorStore decodes whole chunks; memory then follows the largest one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from lora_merge_cli.formats.waiting import finished
from lora_merge_cli.records import Array, Region, region_shape, relative


class TensorStoreArray:
    """One array.

    Args:
        item: The item's directory.
        name: The array's name in it.
        version: Of zarr, 2 or 3.
        ocdbt: Whether the item is an OCDBT database.

    Raises:
        ValueError: TensorStore cannot open it.
    """

    def __init__(self, item: Path, name: str, version: int, *, ocdbt: bool) -> None:
        files = {"driver": "file", "path": f"{item}/" if ocdbt else f"{item}/{name}/"}
        opening = ts.open(
            {
                "driver": "zarr3" if version == 3 else "zarr",
                "kvstore": {"driver": "ocdbt", "base": files, "path": f"{name}/"} if ocdbt else files,
                "recheck_cached_data": False,
                "recheck_cached_metadata": False,
            },
            open=True,
            read=True,
            context=ts.Context({"cache_pool": {"total_bytes_limit": 0}}),
        )
        self._array = finished(opening)
        self._version = version
        self.shape = tuple(int(extent) for extent in self._array.shape)
        self.dtype = np.dtype(self._array.dtype.numpy_dtype)

    def scan(self, regions: Iterable[Region]) -> Iterator[Array]:
        """See `Source.scan`: the chunks that a region lies in are decoded once for all regions that lie in the same ones."""
        held: tuple[Region, Array] | None = None
        for region in regions:
            window = self._window(region)
            if held is None or held[0] != window:
                held = None
                held = window, np.asarray(finished(self._array[window].read()))
            yield np.ascontiguousarray(held[1][relative(region, window)]).reshape(region_shape(region))

    def names(self) -> Iterator[str]:
        """The name of every chunk that must be there."""
        chunk = self._array.chunk_layout.write_chunk.shape or self.shape
        extents = (n if c is None else c for c, n in zip(chunk, self.shape, strict=True))
        counts = [math.ceil(n / c) for n, c in zip(self.shape, extents, strict=True)]
        metadata: dict[str, Any] = self._array.spec().to_json()["metadata"]
        indices = itertools.product(*map(range, counts))
        if self._version == 2:
            separator = metadata.get("dimension_separator", ".")
            return (separator.join(map(str, index)) or "0" for index in indices)
        encoding = metadata.get("chunk_key_encoding", {"name": "default"})
        separator = encoding.get("configuration", {}).get("separator")
        if encoding["name"] == "v2":
            return ((separator or ".").join(map(str, index)) or "0" for index in indices)
        return ((separator or "/").join(("c", *map(str, index))) for index in indices)

    def _window(self, region: Region) -> Region:
        """The whole chunks that a region lies in."""
        chunk = self._array.chunk_layout.read_chunk.shape or self.shape
        return tuple(
            slice(part.start // c * c, min(-(-part.stop // c) * c, n))
            for part, n, c in zip(
                region, self.shape, (max(1, c or n) for c, n in zip(chunk, self.shape, strict=True)), strict=True
            )
        )
