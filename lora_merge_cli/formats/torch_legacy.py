"""Reading what ``torch.save`` wrote before 1.6: five pickles in a row, then each storage's count and bytes.

The pickles are the magic number, the format's version, facts about the machine, the value, and the storages' keys in the order in
which they follow.
"""

from __future__ import annotations

import io
import struct
from typing import Any

from lora_merge_cli.errors import CorruptCheckpoint, UnsupportedCheckpoint
from lora_merge_cli.formats.flat import FlatFile
from lora_merge_cli.formats.torch_pickle import LARGEST_PICKLE, read_pickle
from lora_merge_cli.formats.torch_values import Storage
from lora_merge_cli.formats.torch_zip import Archive

# The number 0x1950a86a20f9469cfc6c, pickled.
MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

_VERSION = 1001
_COUNT = struct.Struct("<q")


def read_legacy(file: FlatFile) -> Archive:
    """Read the pickles of such a file and locate its storages.

    Raises:
        CorruptCheckpoint: It is cut off, or contradicts itself.
        UnsupportedCheckpoint: It is of another version, big-endian, or asks for what no state dict needs.
    """
    path = file.path
    stream = io.BytesIO(file.read_bytes(0, min(file.size, LARGEST_PICKLE)))
    read_pickle(stream, path)
    version, machine = read_pickle(stream, path), read_pickle(stream, path)
    if type(version) is not int or version != _VERSION:
        raise UnsupportedCheckpoint("a torch file of another version", where=path, expected=_VERSION)
    if type(machine) is not dict or machine.get("little_endian") is not True:
        raise UnsupportedCheckpoint("a checkpoint of a big-endian machine", where=path)
    named: dict[str, Storage] = {}
    value = read_pickle(stream, path, named)
    keys = read_pickle(stream, path)
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise CorruptCheckpoint("the list of storages cannot be read", where=path)
    described = stream.getvalue()[: stream.tell()]
    return Archive(file, value, _locate(file, len(described), keys, named), described)


def _locate(file: FlatFile, offset: int, keys: list[str], named: dict[str, Storage]) -> dict[str, Any]:
    storages = {}
    for key in keys:
        storage = named.get(key)
        if storage is None:
            raise CorruptCheckpoint("a storage that no tensor names", where=file.path)
        (count,) = _COUNT.unpack(file.read_bytes(offset, _COUNT.size))
        offset += _COUNT.size
        if count * storage.dtype.itemsize != storage.root_nbytes or storage.root_nbytes > file.size - offset:
            raise CorruptCheckpoint(
                "a storage is cut off, or not of the size that the pickle states",
                where=file.path,
                expected=f"{storage.root_nbytes} bytes",
                found=f"{count} entries, {file.size - offset} bytes left in the file",
                hint="copy the checkpoint again from where it was written",
            )
        storages[key] = (offset, storage.root_nbytes)
        offset += storage.root_nbytes
    return storages
