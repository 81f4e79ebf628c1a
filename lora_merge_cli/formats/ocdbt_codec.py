"""The bytes that OCDBT's manifest and nodes share: integers, names, and the envelope with its checksum.

An envelope is the kind's magic number (uint32, big-endian), the whole's length (uint64, little-endian), a version and a compression
(varints), the body, and the CRC-32C of everything before it (uint32, little-endian). A varint is unsigned LEB128, up to 64 bits.
Source: https://google.github.io/tensorstore/kvstore/ocdbt/index.html, "Storage format".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import google_crc32c
import zstandard

from lora_merge_cli.errors import CorruptCheckpoint, UnsupportedCheckpoint

COPY_AGAIN = "copy the checkpoint again from where it was written"
MAX_NAME_BYTES = 2**16 - 1
"""The longest key, and the longest path of a data file."""

_VERSION = 0
_PLAIN, _ZSTD = 0, 1
_LEVEL = 0  # zstd's own default
_HEADER_BYTES = 12
_CHECKSUM_BYTES = 4
_VARINT_BYTES = 10
_MAX_INDEX_BYTES = 2**29
_NODE_BYTES = 2**13
_ENTRY_BYTES = 256
# A zstd block makes 128 KiB out of as little as four bytes, so what one piece can become is bounded.
_PIECE_BYTES = 256


class Budget:
    """How much memory a database's index may still take, in bytes as estimated.

    Compression, shared prefixes and nodes that several branches share all let a small file stand for an endless index.
    """

    def __init__(self, limit: int = _MAX_INDEX_BYTES) -> None:
        self._limit = limit
        self._left = limit

    def spend(self, size: int, where: str) -> None:
        """Take `size` bytes off.

        Raises:
            CorruptCheckpoint: No so many are left.
        """
        if size > self._left:
            raise CorruptCheckpoint(
                "an index too large to be one", where=where, expected=f"at most {self._limit} bytes"
            )
        self._left -= size


@dataclass(frozen=True)
class Name:
    """A byte string, and how much of its beginning is special to its table: a base path, or a prefix that a subtree shares."""

    full: bytes
    cut: int = 0


class Cursor:
    """Reads a body from its beginning to its end. Each method raises `CorruptCheckpoint` where the bytes are not what it reads."""

    def __init__(self, data: bytes, where: str, budget: Budget) -> None:
        self.where = where
        self._data = data
        self._position = 0
        self._budget = budget

    def corrupt(self, what: str, *, expected: object = None, found: object = None) -> CorruptCheckpoint:
        """The error to raise for something wrong in this body."""
        return CorruptCheckpoint(what, where=self.where, expected=expected, found=found, hint=COPY_AGAIN)

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        if size > self._remaining:
            raise self.corrupt("a node ends too early", expected=f"{size} more bytes", found=self._remaining)
        start = self._position
        self._position += size
        return self._data[start : self._position]

    def byte(self) -> int:
        """A uint8."""
        return self.take(1)[0]

    def uint64(self) -> int:
        """A uint64, little-endian."""
        return int.from_bytes(self.take(8), "little")

    def varint(self) -> int:
        """A varint."""
        value = shift = 0
        for byte in self._data[self._position : self._position + _VARINT_BYTES]:
            self._position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
        else:
            raise self.corrupt("a number without an end")
        if value >= 2**64:
            raise self.corrupt("a number of more than 64 bits")
        return value

    def varints(self, count: int) -> list[int]:
        """A column of `count` varints."""
        return [self.varint() for _ in range(count)]

    def count(self) -> int:
        """A varint that says how many entries follow, each of one byte or more."""
        count = self.varint()
        if count > self._remaining:
            raise self.corrupt("more entries than bytes", expected=f"at most {self._remaining}", found=count)
        self._budget.spend(count * _ENTRY_BYTES, self.where)
        return count

    def names(self, count: int, *, cuts: bool) -> list[Name]:
        """A table of names as `put_names` writes it."""
        shared = [0, *self.varints(count - 1)] if count else []
        own = self.varints(count)
        cut = self.varints(count) if cuts else [0] * count
        names: list[Name] = []
        previous = b""
        for prefix, suffix, special in zip(shared, own, cut, strict=True):
            length = prefix + suffix
            if prefix > len(previous) or special > length or length > MAX_NAME_BYTES:
                raise self.corrupt(
                    "a name with impossible lengths", found=f"{prefix} + {suffix} bytes, {special} special"
                )
            self._budget.spend(length, self.where)
            previous = previous[:prefix] + self.take(suffix)
            names.append(Name(previous, special))
        return names

    def rest(self) -> bytes:
        """Everything that is left."""
        return self.take(self._remaining)

    def end(self) -> None:
        """Nothing may be left."""
        if self._remaining:
            raise self.corrupt("bytes after the end of a node", found=f"{self._remaining} bytes")

    @property
    def _remaining(self) -> int:
        return len(self._data) - self._position


def unseal(magic: int, raw: bytes, where: str, budget: Budget) -> Cursor:
    """The body in the envelope `raw`, unpacked.

    Raises:
        CorruptCheckpoint: It is no such envelope, is damaged, or unpacks to more than the budget.
        UnsupportedCheckpoint: A version or a compression that is not known.
    """
    budget.spend(_NODE_BYTES, where)
    header = Cursor(raw[:-_CHECKSUM_BYTES], where, budget)
    if int.from_bytes(header.take(4), "big") != magic:
        raise header.corrupt(
            "not an OCDBT node of the kind that it should be", expected=f"{magic:08x}", found=raw[:4].hex()
        )
    length = header.uint64()
    if length != len(raw):
        raise header.corrupt("a node of another length than it says", expected=length, found=len(raw))
    if google_crc32c.value(raw[:-_CHECKSUM_BYTES]) != int.from_bytes(raw[-_CHECKSUM_BYTES:], "little"):
        raise header.corrupt("a node whose checksum is wrong")
    version, compression = header.varints(2)
    if version != _VERSION:
        raise UnsupportedCheckpoint("an OCDBT version that is not known", where=where, expected=_VERSION, found=version)
    if compression == _PLAIN:
        return header
    if compression == _ZSTD:
        return Cursor(_decompress(header, budget), where, budget)
    raise UnsupportedCheckpoint("an OCDBT compression that is not known", where=where, found=compression)


def _decompress(packed: Cursor, budget: Budget) -> bytes:
    data = packed.rest()
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    body = bytearray()
    try:
        for start in range(0, len(data), _PIECE_BYTES):
            unpacked = decompressor.decompress(data[start : start + _PIECE_BYTES])
            budget.spend(len(unpacked), packed.where)
            body += unpacked
            if decompressor.eof:
                trailing = decompressor.unused_data or data[start + _PIECE_BYTES :]
                break
        else:
            raise packed.corrupt("compressed data that end too early")
    except zstandard.ZstdError as error:
        raise packed.corrupt("data that cannot be decompressed", found=error) from error
    if trailing:
        raise packed.corrupt("bytes after the end of a node", found=f"{len(trailing)} bytes")
    return bytes(body)


def seal(magic: int, body: bytes | bytearray) -> bytes:
    """The envelope that holds `body`, compressed with zstd."""
    packed = zstandard.ZstdCompressor(level=_LEVEL).compress(body)
    content = varint(_VERSION) + varint(_ZSTD) + packed
    length = _HEADER_BYTES + len(content) + _CHECKSUM_BYTES
    head = magic.to_bytes(4, "big") + length.to_bytes(8, "little") + content
    checksum: int = google_crc32c.value(head)
    return head + checksum.to_bytes(_CHECKSUM_BYTES, "little")


def varint(value: int) -> bytes:
    """`value` as a varint."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def varints(values: Sequence[int]) -> bytes:
    """A column of varints."""
    return b"".join(map(varint, values))


def put_names(names: Sequence[Name], *, cuts: bool) -> bytes:
    """A table of names: how much each shares with the one before (not for the first), how long the rest is, cuts, all the rests."""
    shared = [0] * len(names)
    for index in range(1, len(names)):
        before, name = names[index - 1], names[index]
        # The format lets a path share no more than the base path, unless both have the same.
        if before.cut == name.cut:
            shared[index] = _shared_length(before.full, name.full)
    rests = [name.full[prefix:] for name, prefix in zip(names, shared, strict=True)]
    table = varints(shared[1:]) + varints([len(rest) for rest in rests])
    if cuts:
        table += varints([name.cut for name in names])
    return table + b"".join(rests)


def _shared_length(a: bytes, b: bytes) -> int:
    differing = (index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))
