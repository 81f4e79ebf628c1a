"""The nodes of OCDBT's B+tree: bytes to records and back.

Source: https://google.github.io/tensorstore/kvstore/ocdbt/index.html, "B+tree node format".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_merge_cli.formats.ocdbt_codec import Budget, Cursor, Name, put_names, seal, unseal, varint, varints
from lora_merge_cli.formats.ocdbt_tables import (
    DataFile,
    Extent,
    Statistics,
    decode_extents,
    decode_files,
    decode_place,
    decode_statistics,
    distinct_files,
    encode_extents,
    encode_files,
    encode_statistics,
)

_MAGIC = 0x0CDB20DE
_INLINE, _OUT_OF_LINE = 0, 1


@dataclass(frozen=True, slots=True)
class Leaf:
    """A key without its node's prefix, and its value: the bytes themselves, or where they are."""

    key: bytes
    value: bytes | Extent


@dataclass(frozen=True, slots=True)
class Child:
    """A node below another one."""

    key: bytes
    """No key in it is smaller; without the prefix of the node that holds this entry."""
    prefix_length: int
    """That many bytes of `key` begin all keys in it, and are left out there."""
    node: Extent
    statistics: Statistics


@dataclass(frozen=True)
class Node:
    """A node of the B+tree: leaves at height 0, children above."""

    height: int
    leaves: tuple[Leaf, ...] = ()
    children: tuple[Child, ...] = ()


def decode_node(raw: bytes, base: bytes, where: str, budget: Budget) -> Node:
    """A node. `base` is the base path of the file that it lies in.

    Raises:
        CorruptCheckpoint: It is damaged, or breaks the format.
        UnsupportedCheckpoint: Its version or compression is not known.
    """
    cursor = unseal(_MAGIC, raw, where, budget)
    height = cursor.byte()
    files = decode_files(cursor, base)
    count = cursor.count()
    if count == 0:
        raise cursor.corrupt("a node without entries")
    names = cursor.names(count, cuts=height > 0)
    node = (
        Node(height, children=_decode_children(cursor, files, names))
        if height
        else Node(0, _decode_leaves(cursor, files, names))
    )
    cursor.end()
    return node


def encode_leaves(leaves: Sequence[Leaf]) -> bytes:
    """A node of height 0. The keys are distinct and sorted."""
    extents = [leaf.value for leaf in leaves if isinstance(leaf.value, Extent)]
    inline = [leaf.value for leaf in leaves if isinstance(leaf.value, bytes)]
    files = distinct_files(extents)
    body = bytearray(varint(0))
    body += encode_files(files) + varint(len(leaves)) + put_names([Name(leaf.key) for leaf in leaves], cuts=False)
    body += varints([leaf.value.length if isinstance(leaf.value, Extent) else len(leaf.value) for leaf in leaves])
    body += bytes(_OUT_OF_LINE if isinstance(leaf.value, Extent) else _INLINE for leaf in leaves)
    places = {file: index for index, file in enumerate(files)}
    body += varints([places[extent.file] for extent in extents]) + varints([extent.offset for extent in extents])
    for value in inline:
        body += value
    return seal(_MAGIC, body)


def encode_children(height: int, children: Sequence[Child]) -> bytes:
    """A node of `height` above 0. The keys are distinct and sorted."""
    files = distinct_files(child.node for child in children)
    body = bytearray([height])
    body += encode_files(files) + varint(len(children))
    body += put_names([Name(child.key, child.prefix_length) for child in children], cuts=True)
    body += encode_extents([child.node for child in children], files)
    body += encode_statistics([child.statistics for child in children])
    return seal(_MAGIC, body)


def _decode_children(cursor: Cursor, files: Sequence[DataFile], names: Sequence[Name]) -> tuple[Child, ...]:
    extents = decode_extents(cursor, files, len(names))
    statistics = decode_statistics(cursor, len(names))
    return tuple(
        Child(name.full, name.cut, extent, row) for name, extent, row in zip(names, extents, statistics, strict=True)
    )


def _decode_leaves(cursor: Cursor, files: Sequence[DataFile], names: Sequence[Name]) -> tuple[Leaf, ...]:
    lengths = cursor.varints(len(names))
    kinds = cursor.take(len(names))
    if max(kinds) > _OUT_OF_LINE:
        raise cursor.corrupt("an unknown kind of value", found=max(kinds))
    outside = sum(kinds)
    extents = zip(cursor.varints(outside), cursor.varints(outside), strict=True)
    leaves = []
    for name, length, kind in zip(names, lengths, kinds, strict=True):
        value: bytes | Extent
        if kind == _OUT_OF_LINE:
            index, offset = next(extents)
            value = Extent(decode_place(cursor, files, index), offset, length)
        else:
            value = cursor.take(length)
        leaves.append(Leaf(name.full, value))
    return tuple(leaves)
