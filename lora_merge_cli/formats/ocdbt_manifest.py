"""OCDBT's manifest: which node is the root of the newest version.

Source: https://google.github.io/tensorstore/kvstore/ocdbt/index.html, "Manifest format".
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from lora_merge_cli.errors import UnsupportedCheckpoint
from lora_merge_cli.formats.ocdbt_codec import Budget, Cursor, seal, unseal, varint, varints
from lora_merge_cli.formats.ocdbt_tables import (
    DataFile,
    Extent,
    Statistics,
    decode_extents,
    decode_files,
    decode_statistics,
    encode_extents,
    encode_files,
    encode_statistics,
)

MANIFEST = "manifest.ocdbt"
MAX_INLINE_BYTES = 1024
"""The largest value that Orbax keeps in the tree."""

_MAGIC = 0x0CDB3A2A
_SINGLE, _NUMBERED = 0, 1
_PLAIN, _ZSTD = 0, 1
_UUID_BYTES = 16
_LEVEL_BYTES = 4
_MAX_NODE_BYTES = 100_000_000  # as Orbax sets it, so that one node holds a checkpoint
_ARITY_LOG2 = 4
_MAX_ARITY_LOG2 = 16
_NOWHERE = 2**64 - 1


@dataclass(frozen=True)
class Version:
    """A state of the database."""

    generation: int
    height: int
    """Of its root."""
    root: Extent | None
    """None: it has no keys."""
    statistics: Statistics
    commit_time_ns: int
    """Since the Unix epoch."""


def decode_manifest(raw: bytes, where: str, budget: Budget) -> Version:
    """The newest version that a manifest names, which is always in the manifest itself.

    Raises:
        CorruptCheckpoint: It is damaged, or breaks the format.
        UnsupportedCheckpoint: It keeps its versions in numbered files, or a part of it is of an unknown version or compression.
    """
    cursor = unseal(_MAGIC, raw, where, budget)
    arity_log2 = _decode_config(cursor)
    files = decode_files(cursor, b"")
    count = cursor.count()
    generations = cursor.varints(count)
    heights = [cursor.byte() for _ in range(count)]
    roots = decode_extents(cursor, files, count)
    statistics = decode_statistics(cursor, count)
    times = [cursor.uint64() for _ in range(count)]
    if not 1 <= count <= 2**arity_log2:
        raise cursor.corrupt("an impossible number of versions", expected=f"1 to {2**arity_log2}", found=count)
    if generations[0] == 0 or not (_rises(generations) and _rises(times)):
        raise cursor.corrupt("versions that are not in order")
    _skip_older_versions(cursor, files)
    cursor.end()
    root = None if (roots[-1].offset, roots[-1].length) == (_NOWHERE, _NOWHERE) else roots[-1]
    return Version(generations[-1], heights[-1], root, statistics[-1], times[-1])


def encode_manifest(uuid: bytes, version: Version) -> bytes:
    """A manifest with one version, and the configuration that Orbax writes. `uuid` is the database's, 16 random bytes."""
    root = version.root or Extent(DataFile(b"", b""), _NOWHERE, _NOWHERE)
    body = bytearray(uuid)
    body += varints((_SINGLE, MAX_INLINE_BYTES, _MAX_NODE_BYTES, _ARITY_LOG2, _ZSTD)) + bytes(_LEVEL_BYTES)
    body += encode_files([root.file])
    body += varints((1, version.generation, version.height)) + encode_extents([root], [root.file])
    body += encode_statistics([version.statistics])
    body += version.commit_time_ns.to_bytes(8, "little")
    body += varint(0)  # no versions outside of the manifest
    return seal(_MAGIC, body)


def _decode_config(cursor: Cursor) -> int:
    """Check the configuration and return the logarithm of how many versions a manifest may list."""
    cursor.take(_UUID_BYTES)
    kind = cursor.byte()
    if kind == _NUMBERED:
        raise UnsupportedCheckpoint(
            "an OCDBT database with numbered manifests",
            where=cursor.where,
            expected="a single manifest, as Orbax writes on disks",
        )
    if kind != _SINGLE:
        raise cursor.corrupt("an unknown kind of manifest", found=kind)
    cursor.varints(2)  # the limits on values and nodes bind writers alone
    arity_log2 = cursor.byte()
    if not 1 <= arity_log2 <= _MAX_ARITY_LOG2:
        raise cursor.corrupt("an impossible arity of versions", expected=f"1 to {_MAX_ARITY_LOG2}", found=arity_log2)
    compression = cursor.varint()
    if compression == _ZSTD:
        cursor.take(_LEVEL_BYTES)
    elif compression != _PLAIN:
        raise UnsupportedCheckpoint("an OCDBT compression that is not known", where=cursor.where, found=compression)
    return arity_log2


def _skip_older_versions(cursor: Cursor, files: Sequence[DataFile]) -> None:
    """Read past the references to nodes of versions that the manifest has no room for."""
    count = cursor.count()
    cursor.varints(count)  # generations
    decode_extents(cursor, files, count)
    cursor.varints(count)  # how many generations
    cursor.take(8 * count)  # times
    cursor.take(count)  # heights


def _rises(column: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(column))
