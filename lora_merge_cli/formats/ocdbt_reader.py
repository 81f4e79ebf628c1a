"""Which values an OCDBT database holds, and where their bytes lie.

Orbax keeps a checkpoint in such a database. Its values are read here without the copies that a store in between would make: the
tree is walked once, and says of each value in which file it is, from which byte on and how long.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_merge_cli.errors import CorruptCheckpoint, storage_refusal
from lora_merge_cli.formats.ocdbt_codec import COPY_AGAIN, Budget
from lora_merge_cli.formats.ocdbt_manifest import MANIFEST, decode_manifest
from lora_merge_cli.formats.ocdbt_nodes import Leaf, decode_node
from lora_merge_cli.formats.ocdbt_tables import DataFile, Extent


@dataclass(frozen=True, slots=True)
class Value:
    """One stored value."""

    size: int
    """In bytes."""
    inline: bytes | None
    """The bytes themselves, if they are kept in the tree."""
    file: Path | None
    """Else the file that they lie in, absolute and seen to be long enough."""
    offset: int = 0
    """The first of them in `file`."""


def read_database(directory: Path) -> dict[str, Value]:
    """The values of the newest version by key, sorted, without reading those outside of the tree.

    Raises:
        CorruptCheckpoint: A file is missing or too short, or the manifest or a node is damaged or breaks the format.
        UnsupportedCheckpoint: The manifests are numbered, or something is of an unknown version or compression.
        NotPermitted: The operating system denies access to a file.
    """
    database = _Database(directory)
    values: dict[str, Value] = {}
    previous: bytes | None = None
    for key, leaf, where in database.leaves():
        if previous is not None and key <= previous:
            raise _corrupt("keys that are not in order", where, found=_shown(key))
        try:
            name = key.decode()
        except UnicodeDecodeError as error:
            raise _corrupt("a key that is no text", where, found=_shown(key)) from error
        values[name] = database.value(leaf, name)
        previous = key
    return values


@dataclass(frozen=True)
class _Branch:
    """A node that is still to be read."""

    node: Extent
    height: int
    prefix: bytes
    """What begins all its keys."""
    smallest: bytes
    """No whole key in it is smaller."""


class _Database:
    def __init__(self, directory: Path) -> None:
        self._directory = Path(os.path.abspath(directory))  # noqa: PTH100  (a link keeps its own neighbours)
        self._budget = Budget()
        self._files: dict[DataFile, tuple[Path, int]] = {}

    def leaves(self) -> Iterator[tuple[bytes, Leaf, str]]:
        """Every key, its leaf, and the node that it was found in."""
        manifest = self._directory / MANIFEST
        size = _size(manifest)
        self._budget.spend(size, str(manifest))
        version = decode_manifest(_read(manifest, 0, size), str(manifest), self._budget)
        pending = [] if version.root is None else [_Branch(version.root, version.height, b"", b"")]
        while pending:
            branch = pending.pop()
            raw, where = self._node(branch.node)
            node = decode_node(raw, branch.node.file.base, where, self._budget)
            # Heights that fall by one from node to node are what rules out cycles.
            if node.height != branch.height:
                raise _corrupt("a node of the wrong height", where, expected=branch.height, found=node.height)
            first = branch.prefix + (node.children or node.leaves)[0].key
            if first < branch.smallest:
                raise _corrupt("a key that is not of its branch", where, found=_shown(first))
            for leaf in node.leaves:
                yield branch.prefix + leaf.key, leaf, where
            for child in reversed(node.children):
                key = branch.prefix + child.key
                prefix = key[: len(branch.prefix) + child.prefix_length]
                self._budget.spend(len(key) + len(prefix), where)
                pending.append(_Branch(child.node, node.height - 1, prefix, key))

    def value(self, leaf: Leaf, name: str) -> Value:
        """The value of a leaf, seen to lie within its file."""
        if isinstance(leaf.value, bytes):
            return Value(len(leaf.value), leaf.value, None)
        return Value(leaf.value.length, None, self._locate(leaf.value, name), leaf.value.offset)

    def _node(self, extent: Extent) -> tuple[bytes, str]:
        path = self._locate(extent, f"tree node at {extent.offset}")
        where = f"{path} :: tree node at {extent.offset}"
        self._budget.spend(extent.length, where)
        return _read(path, extent.offset, extent.length), where

    def _locate(self, extent: Extent, what: str) -> Path:
        """The file of an extent, if it holds it all."""
        if extent.file not in self._files:
            path = self._path(extent.file)
            self._files[extent.file] = path, _size(path)
        path, size = self._files[extent.file]
        end = extent.offset + extent.length
        if end > size:
            raise _corrupt("a data file is too short", f"{path} :: {what}", expected=f"{end} bytes", found=size)
        return path

    def _path(self, file: DataFile) -> Path:
        name = os.fsdecode(file.base + file.relative)
        if not name or name.startswith("/") or "\0" in name or ".." in name.split("/"):
            raise _corrupt(
                "a data file outside of the checkpoint", str(self._directory / MANIFEST), found=repr(name[:200])
            )
        return self._directory / name


def _size(path: Path) -> int:
    try:
        status = path.stat()
    except PermissionError as error:
        raise storage_refusal(path, error) from error
    except OSError as error:
        raise _corrupt("a file of the database is missing", str(path), found=error.strerror) from error
    if not stat.S_ISREG(status.st_mode):
        raise _corrupt("a file of the database is not a regular file", str(path))
    return status.st_size


def _read(path: Path, offset: int, length: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)
    except PermissionError as error:
        raise storage_refusal(path, error) from error
    except OSError as error:
        raise _corrupt("a file of the database cannot be read", str(path), found=error.strerror) from error


def _corrupt(what: str, where: str, *, expected: object = None, found: object = None) -> CorruptCheckpoint:
    return CorruptCheckpoint(what, where=where, expected=expected, found=found, hint=COPY_AGAIN)


def _shown(key: bytes) -> str:
    return repr(key[:200])
