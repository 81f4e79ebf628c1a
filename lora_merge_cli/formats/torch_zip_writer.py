"""Writing a zip archive as torch reads and maps it: members uncompressed, their bytes at multiples of 64.

`zipfile` cannot align a member's bytes. Format: PKWARE's APPNOTE.TXT, 6.3.10.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

from lora_merge_cli.formats.file_writer import FileWriter

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


@dataclass(frozen=True)
class _Member:
    name: bytes
    header: int
    data: int
    size: int
    crc: int


class ZipWriter:
    """An archive being written, one member after another.

    Its methods raise OSError where the operating system refuses, be it for what was given earlier.

    Args:
        path: The file, which must not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._file = FileWriter(path)
        self._members: list[_Member] = []
        self._end = 0

    def begin(self, name: str, size: int) -> None:
        """Make room for the header of a member of that size."""
        encoded = name.encode("ascii")
        fixed = self._end + _LOCAL.size + len(encoded) + len(_zip64(size, size)) + 4
        data = -(-fixed // ALIGNMENT) * ALIGNMENT
        self._members.append(_Member(encoded, self._end, data, size, 0))
        self._end = data

    def append(self, piece: bytes | memoryview) -> None:
        """Write the next bytes of the member that was begun last."""
        begun = self._members[-1]
        self._members[-1] = replace(begun, crc=zlib.crc32(piece, begun.crc))
        self._file.write(self._end, piece)
        self._end += len(piece)

    def finish(self) -> None:
        """Write the header of the member that was begun last, once all of its bytes are there."""
        # Only now is the checksum known, which stands before the bytes.
        member = self._members[-1]
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
        self._file.write(member.header, header + member.name + extra)

    def add(self, name: str, contents: bytes) -> None:
        """Write a whole member."""
        self.begin(name, len(contents))
        self.append(contents)
        self.finish()

    def close(self) -> int:
        """Write the directory, and close the file once everything is stored. Returns its size."""
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
        self._file.write(start, end)
        self._file.close()
        return start + len(end)

    def abandon(self) -> None:
        """Close the file as it is, if it is open."""
        self._file.abandon()


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
