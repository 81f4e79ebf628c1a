"""The tables that OCDBT's manifest and nodes share: data files, places in them, and what subtrees hold.

Tables are kept by columns: all files, then all offsets, and so on. An entry names a data file by its place in its node's own table.
Source: https://google.github.io/tensorstore/kvstore/ocdbt/index.html, "Data file table format".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_merge_cli.formats.ocdbt_codec import Cursor, Name, put_names, varint, varints


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file that values or nodes lie in, by its path from the database's directory: `base` and `relative` joined as they are."""

    base: bytes
    """Where the files that this one names begin, too."""
    relative: bytes


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a data file."""

    file: DataFile
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a subtree holds. Sizes are in bytes."""

    keys: int = 0
    tree_bytes: int = 0
    """Of its encoded nodes, the topmost included."""
    value_bytes: int = 0
    """Of the values outside of the tree."""

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.keys + other.keys, self.tree_bytes + other.tree_bytes, self.value_bytes + other.value_bytes
        )


def decode_files(cursor: Cursor, base: bytes) -> list[DataFile]:
    """A node's table of files. `base` is the base path of the file that the node lies in, empty for the manifest."""
    names = cursor.names(cursor.count(), cuts=True)
    return [DataFile(base + name.full[: name.cut], name.full[name.cut :]) for name in names]


def encode_files(files: Sequence[DataFile]) -> bytes:
    """The table that `decode_files` reads. The files are distinct and sorted."""
    names = [Name(file.base + file.relative, len(file.base)) for file in files]
    return varint(len(names)) + put_names(names, cuts=True)


def distinct_files(extents: Iterable[Extent]) -> list[DataFile]:
    """The files that a node with these extents has to list."""
    return sorted({extent.file for extent in extents}, key=lambda file: (file.base, file.relative))


def decode_place(cursor: Cursor, files: Sequence[DataFile], index: int) -> DataFile:
    """The file at a place of the node's table, or `CorruptCheckpoint`."""
    if index >= len(files):
        raise cursor.corrupt("a data file that no table has", expected=f"below {len(files)}", found=index)
    return files[index]


def decode_extents(cursor: Cursor, files: Sequence[DataFile], count: int) -> list[Extent]:
    """Three columns: places of files in the table, offsets, lengths."""
    columns = cursor.varints(count), cursor.varints(count), cursor.varints(count)
    return [
        Extent(decode_place(cursor, files, index), offset, length)
        for index, offset, length in zip(*columns, strict=True)
    ]


def encode_extents(extents: Sequence[Extent], files: Sequence[DataFile]) -> bytes:
    """The columns that `decode_extents` reads."""
    places = {file: index for index, file in enumerate(files)}
    return (
        varints([places[extent.file] for extent in extents])
        + varints([extent.offset for extent in extents])
        + varints([extent.length for extent in extents])
    )


def decode_statistics(cursor: Cursor, count: int) -> list[Statistics]:
    """Three columns: keys, tree bytes, value bytes."""
    columns = cursor.varints(count), cursor.varints(count), cursor.varints(count)
    return [Statistics(*row) for row in zip(*columns, strict=True)]


def encode_statistics(rows: Sequence[Statistics]) -> bytes:
    """The columns that `decode_statistics` reads."""
    return (
        varints([row.keys for row in rows])
        + varints([row.tree_bytes for row in rows])
        + varints([row.value_bytes for row in rows])
    )
