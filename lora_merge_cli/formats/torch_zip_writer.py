"""Writing a zip archive as torch reads and maps it: members uncompressed, their bytes at multiples of 64.

`zipfile` can neither align a member nor take its bytes in another order than the file's.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from lora_merge_cli.formats.flat import write_all

ALIGNMENT = 64

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_END = struct.Struct("<4s4H2LH")
_VERSION, _VERSION64 = 20, 45
# 1 January 1980, the first day there is: the same input makes the same archive.
_TIME, _DATE = 0, 0x21
# What does not fit its field stands in another one, and this in its place.
_ELSEWHERE = 2**32 - 1
_LARGEST, _MOST = 2**32 - 1, 2**16 - 1
_ZIP64_FIELD, _PADDING_FIELD = 0x0001, 0x4246
_PIECE_BYTES = 4 * 2**20


@dataclass(frozen=True)
class _Member:
    name: bytes
    header: int
    data: int
    size: int
    crc: int


class ZipWriter:
    """An archive being written; its methods raise OSError where the operating system refuses.

    A member is begun, its bytes are written at `offset`, in any order and by any means, and it is finished.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._members: list[_Member] = []
        self._end = 0

    def begin(self, name: str, size: int) -> int:
        """Make room for a member of that size, and return where its bytes are to be written."""
        encoded = name.encode("ascii")
        fixed = self._end + _LOCAL.size + len(encoded) + len(_zip64(size, size)) + 4
        data = -(-fixed // ALIGNMENT) * ALIGNMENT
        self._members.append(_Member(encoded, self._end, data, size, 0))
        self._end = data + size
        return data

    def finish(self, crc: int | None) -> None:
        """Write the header of the member that was begun last.

        Args:
            crc: The checksum of its bytes; None if it is not known: then they are read again.
        """
        begun = self._members.pop()
        member = _Member(
            begun.name, begun.header, begun.data, begun.size, self._checksum(begun) if crc is None else crc
        )
        self._members.append(member)
        wide = _zip64(member.size, member.size)
        size = _ELSEWHERE if wide else member.size
        padding = member.data - member.header - _LOCAL.size - len(member.name) - len(wide) - 4
        header = _LOCAL.pack(
            b"PK\x03\x04",
            _VERSION64 if wide else _VERSION,
            0,
            0,
            _TIME,
            _DATE,
            member.crc,
            size,
            size,
            len(member.name),
            len(wide) + 4 + padding,
        )
        extra = wide + struct.pack("<HH", _PADDING_FIELD, padding) + bytes(padding)
        write_all(self.descriptor, member.header, memoryview(header + member.name + extra))

    def add(self, name: str, contents: bytes) -> None:
        """Write a whole member."""
        write_all(self.descriptor, self.begin(name, len(contents)), memoryview(contents))
        self.finish(zlib.crc32(contents))

    def close(self) -> int:
        """Write the directory and close the file. Returns its size."""
        directory = b"".join(map(_directory_entry, self._members))
        count, start = len(self._members), self._end
        end = directory
        if count >= _MOST or start >= _LARGEST or len(directory) >= _LARGEST:
            end += _END64.pack(
                b"PK\x06\x06",
                _END64.size - 12,
                _VERSION64,
                _VERSION64,
                0,
                0,
                count,
                count,
                len(directory),
                start,
            )
            end += _LOCATOR64.pack(b"PK\x06\x07", 0, start + len(directory), 1)
        end += _END.pack(
            b"PK\x05\x06",
            0,
            0,
            min(count, _MOST),
            min(count, _MOST),
            _fitting(len(directory)),
            _fitting(start),
            0,
        )
        write_all(self.descriptor, start, memoryview(end))
        self.abandon()
        return start + len(end)

    def abandon(self) -> None:
        """Close the file as it is, if it is open."""
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            os.close(descriptor)

    def _checksum(self, member: _Member) -> int:
        crc = done = 0
        while done < member.size:
            piece = os.pread(self.descriptor, min(_PIECE_BYTES, member.size - done), member.data + done)
            if not piece:
                raise OSError(errno.EIO, "what was written cannot be read again")
            crc = zlib.crc32(piece, crc)
            done += len(piece)
        return crc


def _directory_entry(member: _Member) -> bytes:
    sizes = (member.size, member.size) if member.size >= _LARGEST else ()
    offset = (member.header,) if member.header >= _LARGEST else ()
    wide = _zip64_field(*sizes, *offset)
    size = _fitting(member.size)
    version = _VERSION64 if wide else _VERSION
    header = _CENTRAL.pack(
        b"PK\x01\x02",
        version,
        version,
        0,
        0,
        _TIME,
        _DATE,
        member.crc,
        size,
        size,
        len(member.name),
        len(wide),
        0,
        0,
        0,
        0,
        _fitting(member.header),
    )
    return header + member.name + wide


def _fitting(number: int) -> int:
    return _ELSEWHERE if number >= _LARGEST else number


def _zip64(*sizes: int) -> bytes:
    """The field that a local header needs for a member whose size does not fit the header."""
    return _zip64_field(*sizes) if max(sizes) >= _LARGEST else b""


def _zip64_field(*numbers: int) -> bytes:
    return struct.pack(f"<HH{len(numbers)}Q", _ZIP64_FIELD, 8 * len(numbers), *numbers) if numbers else b""
