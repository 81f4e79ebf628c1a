"""Reading torch's zip archives: the members are listed by `zipfile` and checked here; their bytes are read where they lie."""

from __future__ import annotations

import io
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_merge_cli.errors import CorruptCheckpoint, UnsupportedCheckpoint
from lora_merge_cli.formats.flat import FlatFile
from lora_merge_cli.formats.torch_pickle import LARGEST_PICKLE, read_pickle

_PICKLE = re.compile(r"([^/]+)/data\.pkl")
_LOCAL = struct.Struct("<4s5H3L2H")
_LOCAL_MAGIC = b"PK\x03\x04"
_ENCRYPTED, _UTF8 = 0x1, 0x800
_LARGEST_DIRECTORY = 32 * 2**20
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, EOFError)


@dataclass(frozen=True)
class Archive:
    """A file of torch's: what its pickle says, and where the bytes are that it speaks of."""

    file: FlatFile
    """The file."""
    value: Any
    """The pickled value; see `read_pickle`."""
    storages: Mapping[str, tuple[int, int]]
    """Offset and size in the file of every storage, by key."""
    described: bytes
    """Everything in the file that describes the tensors: for a digest."""


class _Careful(io.FileIO):
    """A file that `zipfile` cannot be made to read into memory as a whole."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _LARGEST_DIRECTORY:
            raise zipfile.BadZipFile(f"a directory of {size} bytes")
        return super().read(size) or b""


@dataclass(frozen=True)
class _Member:
    """A member whose two headers agree."""

    offset: int
    """Where its bytes begin in the file."""
    size: int
    crc: int


def is_torch_zip(file: FlatFile, head: bytes, *, named_so: bool) -> bool:
    """Whether a zip archive is torch's: it holds ``<prefix>/data.pkl``, or is cut off and began so.

    Raises:
        CorruptCheckpoint: It is cut off, or its directory is damaged, and its name says that it is torch's.
    """
    try:
        with _Careful(file.path) as raw, zipfile.ZipFile(raw) as archive:
            return any(map(_PICKLE.fullmatch, archive.namelist()))
    except _ZIP_ERRORS as error:
        if not (named_so or b"/data.pkl" in head[: _LOCAL.size + 200]):
            return False
        raise CorruptCheckpoint(
            "the zip archive's directory cannot be read",
            where=file.path,
            found=str(error)[:100],
            hint="copy the checkpoint again from where it was written",
        ) from error


def read_zip(file: FlatFile) -> Archive:
    """Read the pickle of a torch zip archive and locate its storages.

    Raises:
        CorruptCheckpoint: The archive contradicts itself, or the pickle cannot be read.
        UnsupportedCheckpoint: It is a TorchScript archive, compressed, encrypted, big-endian, or asks for what no state dict
            needs.
    """
    path = file.path
    with _Careful(path) as raw, zipfile.ZipFile(raw) as archive:
        members = _checked(file, archive)
        directory = file.read_bytes(archive.start_dir, min(file.size - archive.start_dir, _LARGEST_DIRECTORY))
    prefixes = [match[1] for match in map(_PICKLE.fullmatch, members) if match]
    if len(prefixes) != 1:
        raise CorruptCheckpoint("several pickles in one archive", where=path, found=", ".join(sorted(prefixes))[:100])
    prefix = prefixes[0]
    if f"{prefix}/constants.pkl" in members or any(name.startswith(f"{prefix}/code/") for name in members):
        raise UnsupportedCheckpoint(
            "a TorchScript program, and not a state dict",
            where=path,
            hint="save the state dict alone: torch.save(torch.jit.load(FILE).state_dict(), OTHER)",
        )
    order = members.get(f"{prefix}/byteorder")
    if order is not None and file.read_bytes(order.offset, min(order.size, 16)) != b"little":
        raise UnsupportedCheckpoint("a checkpoint of a big-endian machine", where=path)
    pickle = _read_pickled(file, members[f"{prefix}/data.pkl"])
    data = f"{prefix}/data/"
    return Archive(
        file,
        read_pickle(io.BytesIO(pickle), path),
        {
            name.removeprefix(data): (member.offset, member.size)
            for name, member in members.items()
            if name.startswith(data)
        },
        pickle + directory,
    )


def _read_pickled(file: FlatFile, member: _Member) -> bytes:
    where = f"{file.path} :: data.pkl"
    if member.size > LARGEST_PICKLE:
        raise UnsupportedCheckpoint(
            "the pickle is too large", where=where, expected=f"at most {LARGEST_PICKLE} bytes", found=member.size
        )
    pickle = file.read_bytes(member.offset, member.size)
    # torch can be told to leave the checksums out; they are zeros then.
    if member.crc and zlib.crc32(pickle) != member.crc:
        raise CorruptCheckpoint("the checksum does not match", where=where)
    return pickle


def _checked(file: FlatFile, archive: zipfile.ZipFile) -> dict[str, _Member]:
    """The members by name: each stored as it is, once, where no other one is, under one name in both headers."""
    members: dict[str, _Member] = {}
    end = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        where = f"{file.path} :: {info.filename[:200].encode('unicode_escape').decode()}"
        if info.flag_bits & _ENCRYPTED:
            raise UnsupportedCheckpoint("an encrypted archive", where=where)
        if info.compress_type != zipfile.ZIP_STORED:
            raise UnsupportedCheckpoint(
                "a compressed archive, which torch never writes",
                where=where,
                hint="unpack it and pack it again without compression (zip -0)",
            )
        if info.filename in members:
            raise CorruptCheckpoint("two members of one name", where=where)
        if stat.S_ISLNK(info.external_attr >> 16):
            raise CorruptCheckpoint("a symbolic link in the archive", where=where)
        start = _data_offset(file, info, where)
        stop = start + info.compress_size
        if info.compress_size != info.file_size or info.header_offset < end or stop > archive.start_dir:
            raise CorruptCheckpoint("a member overlaps another one, or lies outside the archive", where=where)
        end = stop
        members[info.filename] = _Member(start, info.file_size, info.CRC)
    return members


def _data_offset(file: FlatFile, info: zipfile.ZipInfo, where: str) -> int:
    """Where a member's bytes begin, by the header in front of them."""
    if not 0 <= info.header_offset <= file.size - _LOCAL.size:
        raise CorruptCheckpoint("a member lies outside the archive", where=where)
    header = _LOCAL.unpack(file.read_bytes(info.header_offset, _LOCAL.size))
    magic, flags, method, name_size, extra_size = header[0], header[2], header[3], header[9], header[10]
    name = file.read_bytes(info.header_offset + _LOCAL.size, name_size)
    encoding = "utf-8" if info.flag_bits & _UTF8 else "cp437"
    if magic != _LOCAL_MAGIC or flags & _ENCRYPTED or method or name != info.orig_filename.encode(encoding, "replace"):
        raise CorruptCheckpoint("a member's two headers contradict each other", where=where)
    return int(info.header_offset + _LOCAL.size + name_size + extra_size)
