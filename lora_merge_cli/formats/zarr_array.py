"""The metadata of a zarr array: what its chunks are called, and how their bytes are kept.

Sources: the Zarr specifications, versions 2 and 3 (zarr-specs.readthedocs.io), and TensorStore's ``zarr`` and ``zarr3`` drivers
for the names of bfloat16 and the float8 dtypes, which the specifications lack.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from lora_merge_cli.dtypes import dtype_named

Codec: TypeAlias = Literal["raw", "zstd"]

_MAX_RANK = 32
_V2_KEYS = frozenset({"zarr_format", "shape", "chunks", "dtype", "compressor", "fill_value", "order", "filters"})
_V2_OPTIONAL = frozenset({"dimension_separator"})
_V3_KEYS = frozenset(
    {"zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs", "fill_value"}
)
_V3_OPTIONAL = frozenset({"attributes", "dimension_names", "storage_transformers"})
_V2_NUMBER = re.compile(r"\|(b1|[iu]1)|<([iu][248]|f[248]|c8|c16)")
_V3_NUMBER = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)")
_BEYOND_NUMPY = re.compile(r"bfloat16|float8_(e4m3fn|e4m3fnuz|e4m3b11fnuz|e5m2|e5m2fnuz)")


@dataclass(frozen=True)
class ZarrArray:
    """An array that is kept as chunks of plain little-endian entries in C order, each a value of its own."""

    shape: tuple[int, ...]
    """The array's extents."""
    chunks: tuple[int, ...]
    """A chunk's extents, each at least 1. Chunks at the edge are stored whole, with padding behind the array's end."""
    dtype: np.dtype[Any]
    """The dtype of the entries; bfloat16 and float8 are those of ml_dtypes."""
    codec: Codec
    """``raw``: a chunk's value is its entries; ``zstd``: one Zstandard frame of them."""
    separator: str = "."
    """What stands between the parts of a chunk's name."""
    prefix: tuple[str, ...] = ()
    """The parts of a chunk's name before its indices: ``c`` in version 3."""

    @staticmethod
    def parse(document: bytes, version: int) -> ZarrArray | None:
        """Read the metadata document of an array: ``.zarray`` (version 2) or ``zarr.json`` (version 3).

        Returns:
            The array; None if the metadata are well-formed and ask for more than this class can say: another codec or none that
            is known, Fortran order, filters, shards, transposition, big-endian or structured entries, extensions.

        Raises:
            ValueError: They are no valid metadata of an array of that version.
        """
        try:
            found = json.loads(document)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        required, optional = (_V2_KEYS, _V2_OPTIONAL) if version == 2 else (_V3_KEYS, _V3_OPTIONAL)
        metadata = _mapping(found, "the metadata")
        missing = required - metadata.keys()
        if missing:
            raise ValueError(f"lacks {', '.join(sorted(missing))}")
        if metadata["zarr_format"] != version:
            raise ValueError(f"zarr_format is {metadata['zarr_format']!r}, not {version}")
        # Whoever does not know a key cannot know that it changes nothing.
        if metadata.keys() - required - optional:
            return None
        return _parse_v2(metadata) if version == 2 else _parse_v3(metadata)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many chunks there are along each axis."""
        return tuple(-(-extent // chunk) for extent, chunk in zip(self.shape, self.chunks, strict=True))

    @property
    def chunk_bytes(self) -> int:
        """The size of each chunk when decoded, padding included, in bytes."""
        return math.prod(self.chunks) * self.dtype.itemsize

    def name(self, index: Sequence[int]) -> str:
        """The name, inside the array, of the chunk with these indices, one per axis."""
        return self.separator.join((*self.prefix, *map(str, index))) or "0"

    def names(self) -> Iterator[str]:
        """The name of every chunk, in row-major order of their indices; an array without axes has one chunk."""
        counts = self.counts
        for number in range(math.prod(counts)):
            index: list[int] = []
            rest = number
            for count in reversed(counts):
                rest, position = divmod(rest, count)
                index.insert(0, position)
            yield self.name(index)


def _parse_v2(metadata: Mapping[str, Any]) -> ZarrArray | None:
    shape, chunks = _shapes(metadata["shape"], metadata["chunks"])
    if metadata["order"] not in ("C", "F"):
        raise ValueError(f"order is {metadata['order']!r}")
    separator = _separator(metadata.get("dimension_separator", "."))
    dtype = _v2_dtype(metadata["dtype"])
    codec: Codec = "raw"
    if metadata["compressor"] is not None:
        if _mapping(metadata["compressor"], "compressor").get("id") != "zstd":
            return None
        codec = "zstd"
    if dtype is None or metadata["order"] == "F" or metadata["filters"] or len(shape) > _MAX_RANK:
        return None
    return ZarrArray(shape, chunks, dtype, codec, separator)


def _parse_v3(metadata: Mapping[str, Any]) -> ZarrArray | None:
    if metadata["node_type"] != "array":
        raise ValueError(f"node_type is {metadata['node_type']!r}, not 'array'")
    grid, grid_options = _extension(metadata["chunk_grid"], "chunk_grid")
    if grid != "regular":
        return None
    shape, chunks = _shapes(metadata["shape"], grid_options.get("chunk_shape"))
    keys, key_options = _extension(metadata["chunk_key_encoding"], "chunk_key_encoding")
    if keys not in ("default", "v2"):
        return None
    separator = _separator(key_options.get("separator", "/" if keys == "default" else "."))
    dtype = _v3_dtype(metadata["data_type"])
    if dtype is None or metadata.get("storage_transformers") or len(shape) > _MAX_RANK:
        return None
    codec = _v3_codec(metadata["codecs"], dtype)
    if codec is None:
        return None
    return ZarrArray(shape, chunks, dtype, codec, separator, ("c",) if keys == "default" else ())


def _v2_dtype(spelling: object) -> np.dtype[Any] | None:
    if isinstance(spelling, list):
        return None
    if not isinstance(spelling, str):
        raise ValueError(f"dtype is {spelling!r}")
    known = _V2_NUMBER.fullmatch(spelling) or _BEYOND_NUMPY.fullmatch(spelling)
    return dtype_named(spelling) if known else None


def _v3_dtype(spelling: object) -> np.dtype[Any] | None:
    if isinstance(spelling, dict):
        return None
    if not isinstance(spelling, str):
        raise ValueError(f"data_type is {spelling!r}")
    known = _V3_NUMBER.fullmatch(spelling) or _BEYOND_NUMPY.fullmatch(spelling)
    return dtype_named(spelling) if known else None


def _v3_codec(codecs: object, dtype: np.dtype[Any]) -> Codec | None:
    if not isinstance(codecs, list) or not codecs:
        raise ValueError(f"codecs is {codecs!r}")
    # The name alone is an extension's short form.
    chain = [_extension({"name": codec} if isinstance(codec, str) else codec, "codecs") for codec in codecs]
    first, options = chain[0]
    # Entries of one byte have no byte order to state.
    if first != "bytes" or options.get("endian", "little" if dtype.itemsize == 1 else None) != "little":
        return None
    match [name for name, _ in chain[1:]]:
        case []:
            return "raw"
        case ["zstd"]:
            return "zstd"
    return None


def _shapes(shape: object, chunks: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    extents, chunk = _extents(shape, "shape", least=0), _extents(chunks, "the chunks' shape", least=1)
    if len(extents) != len(chunk):
        raise ValueError(f"the chunks have {len(chunk)} axes, and the array {len(extents)}")
    return extents, chunk


def _extents(value: object, what: str, *, least: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(extent) is int and extent >= least for extent in value):
        raise ValueError(f"{what} is {value!r}")
    return tuple(value)


def _separator(value: object) -> str:
    if value not in (".", "/"):
        raise ValueError(f"the separator of chunk names is {value!r}")
    return str(value)


def _extension(value: object, what: str) -> tuple[str, Mapping[str, Any]]:
    found = _mapping(value, what)
    name = found.get("name")
    if not isinstance(name, str):
        raise ValueError(f"{what} has no name")
    return name, _mapping(found.get("configuration", {}), f"the configuration of {name}")


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no object")
    return value
