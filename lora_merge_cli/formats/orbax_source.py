"""Reading the arrays of one Orbax item through TensorStore, always to the host.

TensorStore alone would hide two kinds of loss: a missing chunk reads as zeros, and a missing data file of an OCDBT database reads
as an empty value. Both are looked for here.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from lora_merge_cli.errors import CorruptCheckpoint
from lora_merge_cli.formats.interface import Stored
from lora_merge_cli.formats.orbax_metadata import (
    TREE_FILE,
    Entry,
    TreeMetadata,
    constant_of,
    read_tree,
    refuse_extended_types,
)
from lora_merge_cli.formats.waiting import finished
from lora_merge_cli.records import Array, Index, KeyPath, Region, TensorSpec, display, first_names

MANIFEST = "manifest.ocdbt"

_ARRAY_METADATA = {2: ".zarray", 3: "zarr.json"}
_STORED_NAME = {2: re.compile(r"\.zarray|\d+([./]\d+)*"), 3: re.compile(r"zarr\.json|c([./]\d+)*")}
_FIRST_LINE = 300


class OrbaxSource:
    """One Orbax item, opened read-only. See `Source` for what each method promises."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ocdbt = (path / MANIFEST).exists()
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._tree: TreeMetadata | None = None
        self._index: Index | None = None
        self._entries: dict[KeyPath, Entry] = {}
        self._arrays: dict[KeyPath, ts.TensorStore] = {}

    @property
    def path(self) -> Path:
        """The item's directory."""
        return self._path

    @property
    def zarr_version(self) -> int:
        """2 or 3."""
        return self._read_tree().zarr_version

    def index(self) -> Index:
        """See `Source.index`."""
        if self._index is None:
            self._index = self._build_index()
        return self._index

    def chunk(self, path: KeyPath) -> tuple[int, ...]:
        """See `Source.chunk`."""
        array = self._array(path)
        return _known(array.chunk_layout.read_chunk.shape, array.shape)

    def read(self, path: KeyPath, region: Region) -> Array:
        """See `Source.read`."""
        try:
            return np.asarray(finished(self._array(path)[region].read()))
        except (ValueError, OSError) as error:
            raise self._corrupt(path, error) from error

    def stored(self, path: KeyPath) -> Stored | None:
        """See `Source.stored`.

        Only an OCDBT database keeps the length of each value, so only there is a copy a check. Where chunks of zeros were left
        out, a copy would have to leave them out too, which the output's metadata denies.
        """
        if not (self._ocdbt and self._read_tree().fill_values_stored):
            return None
        return Stored(f"orbax-zarr{self.zarr_version}", self._stored_values(path))

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        digest = hashlib.sha256()
        for folder, folders, files in os.walk(self._path):
            folders.sort()
            for name in sorted(files):
                file = Path(folder, name)
                relative = file.relative_to(self._path).as_posix()
                digest.update(f"{relative}\0{file.lstat().st_size}\0".encode())
                if name in (TREE_FILE, MANIFEST):
                    digest.update(file.read_bytes())
        return f"sha256:{digest.hexdigest()}"

    def _read_tree(self) -> TreeMetadata:
        if self._tree is None:
            self._tree = read_tree(self._path)
            refuse_extended_types(self._path)
        return self._tree

    def _build_index(self) -> Index:
        tree = self._read_tree()
        constants, opening = [], {}
        for entry in tree.entries:
            constant = constant_of(entry, tree, self._path)
            if constant is not None:
                constants.append(constant)
                continue
            self._entries[entry.path] = entry
            opening[entry.path] = ts.open(
                {
                    "driver": "zarr3" if tree.zarr_version == 3 else "zarr",
                    "kvstore": self._kvstore(f"{entry.storage_name}/"),
                    "recheck_cached_data": False,
                    "recheck_cached_metadata": False,
                },
                open=True,
                read=True,
                context=self._context,
            )
        tensors = {}
        for path, future in opening.items():
            try:
                array = finished(future)
            except (ValueError, OSError) as error:
                raise self._corrupt(path, error) from error
            self._arrays[path] = array
            tensors[path] = TensorSpec(
                path,
                tuple(array.shape),
                np.dtype(array.dtype.numpy_dtype),
                "scalar" if self._entries[path].value_type == "scalar" else "array",
            )
        if tree.fill_values_stored:
            self._refuse_missing_chunks(tensors)
        return Index(tensors, tuple(constants))

    def _kvstore(self, prefix: str) -> dict[str, Any]:
        files = {"driver": "file", "path": f"{self._path}/"}
        if self._ocdbt:
            return {"driver": "ocdbt", "base": files, "path": prefix}
        return {"driver": "file", "path": f"{self._path}/{prefix}"}

    def _array(self, path: KeyPath) -> ts.TensorStore:
        self.index()
        return self._arrays[path]

    def _refuse_missing_chunks(self, tensors: dict[KeyPath, TensorSpec]) -> None:
        present = self._names()
        for path, spec in tensors.items():
            if spec.size == 0:
                continue
            shape = _known(self._arrays[path].chunk_layout.write_chunk.shape, spec.shape)
            counts = [math.ceil(n / c) for n, c in zip(spec.shape, shape, strict=True)]
            prefix = self._entries[path].storage_name
            missing = [name for name in self._chunk_names(path, counts) if f"{prefix}/{name}" not in present]
            if missing:
                raise CorruptCheckpoint(
                    "chunks are missing",
                    where=f"{self._path} :: {display(path)}",
                    expected=f"{math.prod(counts)} chunks",
                    found=f"none at {first_names(missing, 3)}",
                    hint="copy the checkpoint again from where it was written",
                )

    def _chunk_names(self, path: KeyPath, counts: list[int]) -> Iterator[str]:
        metadata = self._arrays[path].spec().to_json()["metadata"]
        indices = itertools.product(*map(range, counts))
        if self.zarr_version == 2:
            separator = metadata.get("dimension_separator", ".")
            return (separator.join(map(str, index)) or "0" for index in indices)
        encoding = metadata.get("chunk_key_encoding", {"name": "default"})
        separator = encoding.get("configuration", {}).get("separator")
        if encoding["name"] == "v2":
            return ((separator or ".").join(map(str, index)) or "0" for index in indices)
        return ((separator or "/").join(("c", *map(str, index))) for index in indices)

    def _names(self) -> frozenset[str]:
        if self._ocdbt:
            try:
                store = finished(ts.KvStore.open(self._kvstore(""), context=self._context))
                return frozenset(name.decode() for name in finished(store.list()))
            except (ValueError, OSError) as error:
                raise self._corrupt(None, error) from error
        return frozenset(
            Path(folder, name).relative_to(self._path).as_posix()
            for folder, _, files in os.walk(self._path)
            for name in files
        )

    def _stored_values(self, path: KeyPath) -> Iterator[tuple[str, bytes]]:
        self.index()
        prefix = f"{self._entries[path].storage_name}/"
        store = finished(ts.KvStore.open(self._kvstore(prefix), context=self._context))
        pattern = _STORED_NAME[self.zarr_version]
        try:
            names = sorted(name.decode() for name in finished(store.list()))
            for name in filter(pattern.fullmatch, names):
                value = finished(store.read(name)).value
                if not value:
                    raise CorruptCheckpoint(
                        "a stored chunk is empty, so a data file is missing",
                        where=f"{self._path} :: {display(path)}",
                        found=f"no bytes for {name}",
                        hint="copy the checkpoint again from where it was written",
                    )
                yield name, value
        except (ValueError, OSError) as error:
            raise self._corrupt(path, error) from error

    def _corrupt(self, path: KeyPath | None, error: Exception) -> CorruptCheckpoint:
        where = str(self._path) if path is None else f"{self._path} :: {display(path)}"
        reason = str(error).split(" [")[0]
        return CorruptCheckpoint(
            "cannot be read",
            where=where,
            found=reason[:_FIRST_LINE],
            hint="a file is missing or damaged: copy the checkpoint again from where it was written",
        )


def _known(chunk: Sequence[int | None] | None, shape: Sequence[int]) -> tuple[int, ...]:
    """A chunk's extents; the array's own where the layout leaves one open."""
    return tuple(n if c is None else c for c, n in zip(chunk or shape, shape, strict=True))
