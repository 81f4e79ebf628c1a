"""The header of a safetensors file: what tensors there are, and where their bytes lie.

A file is eight bytes with the header's length (little-endian), the header as a JSON object, and the tensors' bytes without gaps.
The checks are those of the safetensors library, and names that occur twice are refused too, of which it silently takes one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from lora_merge_cli.errors import CorruptCheckpoint, UnsupportedCheckpoint
from lora_merge_cli.formats.flat import FlatFile

METADATA = "__metadata__"

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
_MAX_COUNT = 2**63 - 1
_MAX_AXES = 32
_LONGEST_TEXT = 200
_LFS_POINTER = b"version https://git-lfs"

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
# Versions of ml_dtypes before 0.5 do not have it.
if hasattr(ml_dtypes, "float8_e8m0fnu"):
    _DTYPES["F8_E8M0"] = np.dtype(ml_dtypes.float8_e8m0fnu)
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    """Where its bytes begin in the file."""

    @property
    def nbytes(self) -> int:
        """How many they are."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """A parsed header."""

    entries: tuple[Entry, ...]
    """Every tensor, in the order of their bytes."""
    metadata: Mapping[str, str]
    """The texts under ``__metadata__``."""
    digest: str
    """The SHA-256 of the header's own bytes."""


def read_header(file: FlatFile) -> Header:
    """Parse and check a file's header.

    Raises:
        CorruptCheckpoint: It breaks the format, or the file is not as long as it says.
        UnsupportedCheckpoint: A tensor's dtype is one that NumPy and ml_dtypes do not have, or it has too many axes.
    """
    raw = _header_bytes(file)
    try:
        document = strict_json(raw)
    except (ValueError, RecursionError) as error:
        raise _not_safetensors(file, f"a header that is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise _not_safetensors(file, "a header that is no JSON object")
    metadata = document.pop(METADATA, None) or {}
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise CorruptCheckpoint("metadata that are not texts by name", where=f"{file.path} :: {METADATA}")
    start = _LENGTH_BYTES + len(raw)
    placed = sorted((_placed(file, name, item) for name, item in document.items()), key=lambda found: found[:2])
    _refuse_gaps(file, start, placed)
    entries = tuple(Entry(item.name, item.shape, item.dtype, start + begin) for begin, _, item in placed)
    return Header(entries, metadata, hashlib.sha256(raw).hexdigest())


def looks_like_safetensors(file: FlatFile) -> bool:
    """Whether a file begins as a safetensors one does: a length that fits it, and an opening brace."""
    if file.size <= _LENGTH_BYTES:
        return False
    head = file.read_bytes(0, _LENGTH_BYTES + 1)
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    return length <= min(_MAX_HEADER_BYTES, file.size - _LENGTH_BYTES) and head.endswith(b"{")


def build_header(
    tensors: Sequence[tuple[str, Sequence[int], np.dtype[Any]]], metadata: Mapping[str, str]
) -> tuple[bytes, tuple[Entry, ...]]:
    """The bytes that a file begins with, and where each tensor's bytes go, in the order given.

    Args:
        tensors: Name, shape and dtype of each. For aligned data, sort them by descending itemsize.
        metadata: Texts to keep beside them.

    Raises:
        UnsupportedCheckpoint: A dtype has no name in the format, a name is not allowed, or the header is too long for it.
    """
    document: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    entries = []
    end = 0
    for name, shape, dtype in tensors:
        if dtype not in _NAMES:
            raise UnsupportedCheckpoint("a dtype that safetensors cannot hold", where=name, found=dtype.name)
        if name == METADATA:
            raise UnsupportedCheckpoint("a tensor's name that safetensors keeps for itself", where=name)
        entry = Entry(name, tuple(shape), dtype, end)
        end += entry.nbytes
        entries.append(entry)
        document[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [entry.offset, end]}
    try:
        raw = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise UnsupportedCheckpoint("a name or text that is not Unicode", found=ascii(error.object[:80])) from error
    raw += b" " * (-len(raw) % _LENGTH_BYTES)
    if len(raw) > _MAX_HEADER_BYTES:
        raise UnsupportedCheckpoint(
            "too many names and texts for one safetensors file",
            expected=f"a header of at most {_MAX_HEADER_BYTES} bytes",
            found=len(raw),
            hint="write smaller shards",
        )
    start = _LENGTH_BYTES + len(raw)
    return len(raw).to_bytes(_LENGTH_BYTES, "little") + raw, tuple(
        Entry(entry.name, entry.shape, entry.dtype, start + entry.offset) for entry in entries
    )


def strict_json(text: str | bytes) -> Any:
    """Parse JSON, and refuse what parsers disagree about: names that occur twice, NaN, text that is not Unicode.

    Raises:
        ValueError: It is not such JSON.
        RecursionError: It is nested too deeply.
    """
    if isinstance(text, bytes):
        text = text.decode()
    document = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    if "\\u" in text:
        # An escaped half of a surrogate pair parses, and is no text.
        json.dumps(document, ensure_ascii=False).encode()
    return document


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{_short(key)} occurs twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _header_bytes(file: FlatFile) -> bytes:
    head = file.read_bytes(0, min(len(_LFS_POINTER), file.size))
    if head == _LFS_POINTER:
        raise CorruptCheckpoint(
            "a Git LFS pointer, where the file itself is wanted", where=file.path, hint="run `git lfs pull` there"
        )
    if len(head) < _LENGTH_BYTES:
        raise _not_safetensors(file, f"a file of {file.size} bytes")
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if length > _MAX_HEADER_BYTES:
        raise _not_safetensors(file, f"a header of {length} bytes by its first eight")
    if length > file.size - _LENGTH_BYTES:
        raise _not_safetensors(file, f"a header of {length} bytes in a file of {file.size}")
    return file.read_bytes(_LENGTH_BYTES, length)


def _placed(file: FlatFile, name: str, item: Any) -> tuple[int, int, Entry]:
    """Where a tensor's bytes begin and end behind the header, and the tensor with no offset yet."""
    where = f"{file.path} :: {_short(name)}"
    try:
        kind, shape, (begin, end) = item["dtype"], item["shape"], item["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpoint(
            "an entry that is not what safetensors writes", where=where, found=repr(error)
        ) from error
    if not (isinstance(kind, str) and isinstance(shape, list) and _are_counts([*shape, begin, end])):
        raise CorruptCheckpoint("an entry that is not what safetensors writes", where=where, found=_short(item))
    if kind not in _DTYPES:
        raise UnsupportedCheckpoint("a dtype that is not supported", where=where, found=_short(kind))
    if len(shape) > _MAX_AXES:
        raise UnsupportedCheckpoint("too many axes", where=where, expected=f"at most {_MAX_AXES}", found=len(shape))
    entry = Entry(name, tuple(shape), _DTYPES[kind], 0)
    # The extents besides a zero count too: an array of them could not be made.
    if math.prod(filter(None, shape)) * entry.dtype.itemsize > _MAX_COUNT:
        raise CorruptCheckpoint("a shape beyond all bounds", where=where, found=shape)
    if entry.nbytes != end - begin:
        raise CorruptCheckpoint(
            "a size that does not fit shape and dtype",
            where=where,
            expected=f"{entry.nbytes} bytes for {kind} {shape}",
            found=f"{begin} to {end}",
        )
    return begin, end, entry


def _are_counts(values: Iterable[Any]) -> bool:
    return all(type(value) is int and 0 <= value <= _MAX_COUNT for value in values)


def _refuse_gaps(file: FlatFile, start: int, placed: Iterable[tuple[int, int, Entry]]) -> None:
    position = 0
    for begin, end, entry in placed:
        if begin != position:
            raise CorruptCheckpoint(
                "tensors that overlap" if begin < position else "bytes that belong to no tensor",
                where=f"{file.path} :: {_short(entry.name)}",
                expected=f"its data at {position}",
                found=begin,
            )
        position = end
    if start + position != file.size:
        too_short = start + position > file.size
        raise CorruptCheckpoint(
            "the file ends too soon" if too_short else "bytes behind the last tensor",
            where=file.path,
            expected=f"{start + position} bytes",
            found=file.size,
            hint="copy or download it again" if too_short else None,
        )


def _short(item: Any) -> str:
    """What a message can hold of something that a hostile file may have made long."""
    text = str(item)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."


def _not_safetensors(file: FlatFile, found: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        "not a safetensors file, or a damaged one", where=file.path, found=found, hint="copy or download it again"
    )
