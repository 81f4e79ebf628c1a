"""Writing an OCDBT database: values straight to disk as they come, then the tree, then the manifest."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from lora_merge_cli.formats.ocdbt_codec import MAX_NAME_BYTES
from lora_merge_cli.formats.ocdbt_manifest import MANIFEST, MAX_INLINE_BYTES, Version, encode_manifest
from lora_merge_cli.formats.ocdbt_nodes import Child, Leaf, encode_children, encode_leaves
from lora_merge_cli.formats.ocdbt_tables import DataFile, Extent, Statistics

_FOLDER = "d"
_ENTRY_BYTES = 32  # an entry's numbers, at most
_GENERATION = 1

_Entry = TypeVar("_Entry")


class FileLike(Protocol):
    """A new file that only grows."""

    def append(self, buffer: bytes | memoryview) -> None:
        """Write `buffer` at its end."""

    def close(self) -> None:
        """Finish it: nothing follows."""


class OcdbtWriter:
    """A new database with one version.

    Values of up to 1024 bytes are kept in the tree, others in files of random names. Only keys and what is kept in the tree stay in
    memory. Until `finish` has returned there is no database. Errors of the files pass through.

    Args:
        directory: Where it will be. It is made if it is not there, and must not hold a database.
        create: Makes a new file.
        max_file_bytes: No value is begun in a data file of that size or more; none is split.
        max_node_bytes: How large a node's content may become before a second one is begun.
    """

    def __init__(
        self,
        directory: Path,
        create: Callable[[Path], FileLike],
        *,
        max_file_bytes: int = 2 * 2**30,
        max_node_bytes: int = 8 * 2**20,
    ) -> None:
        self._directory = directory
        self._create = create
        self._max_file_bytes = max_file_bytes
        self._max_node_bytes = max_node_bytes
        self._leaves: dict[bytes, Leaf] = {}
        self._file: FileLike | None = None
        self._name = DataFile(b"", b"")
        self._offset = 0

    def add(self, name: str, pieces: Iterable[bytes | memoryview]) -> int:
        """Store a value, given in pieces, and return its size in bytes.

        Raises:
            ValueError: The name is taken, or is longer than 65535 bytes, or is not text.
        """
        key = name.encode()
        if key in self._leaves:
            raise ValueError(f"stored twice: {name}")
        if len(key) > MAX_NAME_BYTES:
            raise ValueError(f"a key of {len(key)} bytes, more than {MAX_NAME_BYTES}: {name[:100]}...")
        value = self._store(pieces)
        self._leaves[key] = Leaf(key, value)
        return value.length if isinstance(value, Extent) else len(value)

    def finish(self) -> None:
        """Write the tree, and last the manifest."""
        version = self._tree()
        if self._file is not None:
            self._file.close()
        self._directory.mkdir(parents=True, exist_ok=True)
        manifest = self._create(self._directory / MANIFEST)
        manifest.append(encode_manifest(secrets.token_bytes(16), version))
        manifest.close()

    def _store(self, pieces: Iterable[bytes | memoryview]) -> bytes | Extent:
        head = bytearray()
        remaining = _flat(pieces)
        for piece in remaining:
            if len(head) + len(piece) > MAX_INLINE_BYTES:
                return self._append(itertools.chain((bytes(head), piece), remaining))
            head += piece
        return bytes(head)

    def _append(self, pieces: Iterable[bytes | memoryview]) -> Extent:
        file = self._file
        if file is None or self._offset >= self._max_file_bytes:
            file = self._begin_file()
        start = self._offset
        for piece in pieces:
            file.append(piece)
            self._offset += len(piece)
        return Extent(self._name, start, self._offset - start)

    def _begin_file(self) -> FileLike:
        if self._file is not None:
            self._file.close()
        relative = f"{_FOLDER}/{secrets.token_hex(16)}"
        (self._directory / _FOLDER).mkdir(parents=True, exist_ok=True)
        self._file = self._create(self._directory / relative)
        self._name = DataFile(b"", relative.encode())
        self._offset = 0
        return self._file

    def _tree(self) -> Version:
        leaves = sorted(self._leaves.values(), key=lambda leaf: leaf.key)
        nodes = [self._leaf_node(group) for group in self._groups(leaves, _leaf_bytes, least=1)]
        height = 0
        while len(nodes) > 1:
            height += 1
            nodes = [self._inner_node(height, group) for group in self._groups(nodes, _child_bytes, least=2)]
        if not nodes:
            return Version(_GENERATION, height, None, Statistics(), time.time_ns())
        return Version(_GENERATION, height, nodes[0].node, nodes[0].statistics, time.time_ns())

    def _groups(self, entries: Sequence[_Entry], size: Callable[[_Entry], int], *, least: int) -> list[list[_Entry]]:
        """The entries cut into as many nodes as it takes, each but the last of `least` entries or more."""
        groups: list[list[_Entry]] = []
        filled = 0
        for entry in entries:
            added = size(entry)
            if not groups or (filled + added > self._max_node_bytes and len(groups[-1]) >= least):
                groups.append([])
                filled = 0
            groups[-1].append(entry)
            filled += added
        return groups

    def _leaf_node(self, leaves: Sequence[Leaf]) -> Child:
        outside = sum(leaf.value.length for leaf in leaves if isinstance(leaf.value, Extent))
        return self._node(leaves[0].key, encode_leaves(leaves), Statistics(len(leaves), 0, outside))

    def _inner_node(self, height: int, children: Sequence[Child]) -> Child:
        below = sum((child.statistics for child in children), Statistics())
        return self._node(children[0].key, encode_children(height, children), below)

    def _node(self, key: bytes, encoded: bytes, statistics: Statistics) -> Child:
        extent = self._append([encoded])
        return Child(key, 0, extent, statistics + Statistics(tree_bytes=len(encoded)))


def _leaf_bytes(leaf: Leaf) -> int:
    return _ENTRY_BYTES + len(leaf.key) + (len(leaf.value) if isinstance(leaf.value, bytes) else 0)


def _child_bytes(child: Child) -> int:
    return _ENTRY_BYTES + len(child.key)


def _flat(pieces: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """The pieces as plain bytes, whatever items a view has; none is empty."""
    for piece in pieces:
        view = memoryview(piece)
        if view.nbytes:
            yield view.cast("B")
